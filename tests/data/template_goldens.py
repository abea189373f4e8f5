"""Renderings written out by hand, from how the families document their formats: name → (prompt, answer).

Of the chat: system "Be brief.", user "Hi", assistant "Hello.", user "Bye?", assistant "Yes."; <s> and </s> are the tokenizer's own.
The prompt is what generation sees before the last answer; the answer runs through its stop token.
"""

from __future__ import annotations

from posttrain.types import Message

GOLDEN_CHAT = (
    Message("system", "Be brief."), Message("user", "Hi"), Message("assistant", "Hello."),
    Message("user", "Bye?"), Message("assistant", "Yes."),
)  # fmt: skip
THINKING = (
    Message("user", "1+1?"), Message("assistant", "<think>\neasy\n</think>\n\n2"),
    Message("user", "2+2?"), Message("assistant", "<think>\nhm\n</think>\n\n4"),
)  # fmt: skip
SKY = {
    "type": "function",
    "function": {
        "name": "sky",
        "description": "What the sky looks like",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "where"}},
            "required": ["city"],
        },
    },
}

_IM = "<|im_start|>"
_CHATML = f"{_IM}system\nBe brief.<|im_end|>\n{_IM}user\nHi<|im_end|>\n{_IM}assistant\nHello.<|im_end|>\n{_IM}user\nBye?<|im_end|>\n{_IM}assistant\n"
_LLAMA2 = "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST] Hello. </s><s>[INST] Bye? [/INST]"
_PHI3 = "<|system|>\nBe brief.<|end|>\n<|user|>\nHi<|end|>\n<|assistant|>\nHello.<|end|>\n<|user|>\nBye?<|end|>\n<|assistant|>"
_TURN = "<|START_OF_TURN_TOKEN|>"
_END = "<|END_OF_TURN_TOKEN|>"

GOLDENS: dict[str, tuple[str, str]] = {
    "alpaca": (
        "<s>Be brief.\n\n### Instruction:\nHi\n\n### Response:\nHello.</s>\n\n### Instruction:\nBye?\n\n### Response:\n",
        "Yes.</s>",
    ),
    "aquila": ("<s>Be brief.###Human: Hi###Assistant: Hello.</s>Human: Bye?###Assistant:", " Yes.</s>"),
    "baichuan": ("Be brief.<reserved_102>Hi<reserved_103>Hello.<reserved_102>Bye?<reserved_103>", "Yes.</s>"),
    "baichuan2": ("Be brief.<reserved_106>Hi<reserved_107>Hello.<reserved_106>Bye?<reserved_107>", "Yes.</s>"),
    "base": ("<s>Be brief.\n\nHiHello.</s>Bye?", "Yes.</s>"),
    "belle": ("<s>Be brief.\n\nHuman: Hi\n\nBelle: Hello.</s>\n\nHuman: Bye?\n\nBelle: ", "Yes.</s>"),
    "chatglm2": ("[gMASK]sopBe brief.\n\n[Round 1]\n\n问：Hi\n\n答：Hello.\n\n[Round 2]\n\n问：Bye?\n\n答：", "Yes.</s>"),
    "chatglm3": (
        "[gMASK]sop<|system|>\n Be brief.<|user|>\n Hi<|assistant|>\n Hello.<|user|>\n Bye?<|assistant|>",
        "\n Yes.<|user|>",
    ),
    "chatml": (_CHATML, "Yes.<|im_end|>"),
    "cohere": (
        f"<s>{_TURN}<|SYSTEM_TOKEN|>Be brief.{_END}{_TURN}<|USER_TOKEN|>Hi{_END}{_TURN}<|CHATBOT_TOKEN|>Hello.{_END}"
        f"{_TURN}<|USER_TOKEN|>Bye?{_END}{_TURN}<|CHATBOT_TOKEN|>",
        f"Yes.{_END}",
    ),
    "deepseek": ("<s>Be brief.\n\nUser: Hi\n\nAssistant: Hello.</s>User: Bye?\n\nAssistant:", " Yes.</s>"),
    "deepseek3": ("<s>Be brief.<｜User｜>Hi<｜Assistant｜>Hello.</s><｜User｜>Bye?<｜Assistant｜>", "Yes.</s>"),
    "deepseekcoder": (
        "<s>Be brief.\n### Instruction:\nHi\n### Response:\nHello.\n<|EOT|>\n### Instruction:\nBye?\n### Response:",
        "\nYes.\n<|EOT|>",
    ),
    "deepseekr1": (
        "<s>Be brief.<｜User｜>Hi<｜Assistant｜>Hello.</s><｜User｜>Bye?<｜Assistant｜><think>\n",
        "\n</think>\n\nYes.</s>",
    ),
    "gemma": (
        "<s><start_of_turn>user\nBe brief.\n\nHi<end_of_turn>\n<start_of_turn>model\nHello.<end_of_turn>\n"
        "<start_of_turn>user\nBye?<end_of_turn>\n<start_of_turn>model\n",
        "Yes.<end_of_turn>",
    ),
    "glm4": ("[gMASK]<sop><|system|>\nBe brief.<|user|>\nHi<|assistant|>\nHello.<|user|>\nBye?<|assistant|>", "\nYes.<|user|>"),
    "intern2": (f"<s>{_CHATML}", "Yes.<|im_end|>"),
    "internlm": (
        "<s><|System|>:Be brief.\n<|User|>:Hi<eoh>\n<|Bot|>:Hello.<eoa>\n<|User|>:Bye?<eoh>\n<|Bot|>:",
        "Yes.<eoa>",
    ),
    "linly": ("<s>Be brief.\nUser: Hi\nBot: Hello.</s>\nUser: Bye?\nBot:", " Yes.</s>"),
    "llama2": (_LLAMA2, " Yes. </s>"),
    "llama2_zh": (_LLAMA2, " Yes. </s>"),
    "llama3": (
        "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nHello.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nBye?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        "Yes.<|eot_id|>",
    ),
    "mistral": ("<s>[INST] Hi[/INST] Hello.</s>[INST] Be brief.\n\nBye?[/INST]", " Yes.</s>"),
    "orion": ("<s>Be brief.\n\nHuman: Hi\n\nAssistant: </s>Hello.</s>Human: Bye?\n\nAssistant: </s>", "Yes.</s>"),
    "phi3": (f"{_PHI3}\n", "Yes.<|end|>"),
    "phi4": (
        f"{_IM}system<|im_sep|>Be brief.<|im_end|>{_IM}user<|im_sep|>Hi<|im_end|>{_IM}assistant<|im_sep|>Hello.<|im_end|>"
        f"{_IM}user<|im_sep|>Bye?<|im_end|>{_IM}assistant<|im_sep|>",
        "Yes.<|im_end|>",
    ),
    "phoenix": ("Be brief.\n\nHuman: <s>Hi</s>Assistant: <s>Hello.</s>Human: <s>Bye?</s>Assistant: <s>", "Yes.</s>"),
    "qwen": (_CHATML, "Yes.<|im_end|>"),
    "qwen3": (_CHATML, "<think>\n\n</think>\n\nYes.<|im_end|>"),
    "qwen3_nothink": (_CHATML, "Yes.<|im_end|>"),
    "starchat": (_PHI3, "\nYes.<|end|>"),
    "vicuna": ("<s>Be brief. USER: Hi ASSISTANT: Hello.</s>USER: Bye? ASSISTANT:", " Yes.</s>"),
    "xverse": ("System: Be brief.\n\nHuman: Hi\n\nAssistant: Hello.</s>Human: Bye?\n\nAssistant: ", "Yes.</s>"),
    "yi": (_CHATML, "Yes.<|im_end|>"),
    "zephyr": (
        "<|system|>\nBe brief.</s>\n<|user|>\nHi</s>\n<|assistant|>\nHello.</s>\n<|user|>\nBye?</s>\n<|assistant|>\n",
        "Yes.</s>",
    ),
    "ziya": ("<s>Be brief.\n<human>:Hi\n<bot>:Hello.</s>\n<human>:Bye?\n<bot>:", "Yes.</s>"),
}

_VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
# Families with a system prompt of their own: the prompt for a lone "Hi".
DEFAULTS: dict[str, str] = {
    "alpaca": (
        "<s>Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nHi\n\n### Response:\n"
    ),
    "aquila": f"<s>{_VICUNA.replace('user', 'human')}###Human: Hi###Assistant:",
    "deepseekcoder": (
        "<s>You are an AI programming assistant, utilizing the Deepseek Coder model, developed by Deepseek Company, and you only "
        "answer questions related to computer science. For politically sensitive questions, security and privacy issues, and other "
        "non-computer science questions, you will refuse to answer\n### Instruction:\nHi\n### Response:"
    ),
    "llama2_zh": "<s>[INST] <<SYS>>\nYou are a helpful assistant. 你是一个乐于助人的助手。\n<</SYS>>\n\nHi [/INST]",
    "phoenix": f"{_VICUNA.replace('user', 'human')}\n\nHuman: <s>Hi</s>Assistant: <s>",
    "qwen": (
        f"{_IM}system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
        f"{_IM}user\nHi<|im_end|>\n{_IM}assistant\n"
    ),
    "vicuna": f"<s>{_VICUNA} USER: Hi ASSISTANT:",
}

# The chat with a tool, from the question on: user "Rome?", call of sky(city="Rome"), result "sunny", and the answer "Sun.". Name →
# (the call's turn, what stands between it and the answer's turn, the answer's turn).
_HERMES_CALL = '<tool_call>\n{"name": "sky", "arguments": {"city": "Rome"}}\n</tool_call>'
_RESPONSE = "<tool_response>\nsunny\n</tool_response>"
TOOLS: dict[str, tuple[str, str, str]] = {
    "chatglm3": ("sky\n ```python\ntool_call(city='Rome')\n```<|observation|>", "\n sunny<|assistant|>", "\n Sun.<|user|>"),
    "chatml": (f"{_HERMES_CALL}<|im_end|>", f"\n{_IM}tool\n{_RESPONSE}<|im_end|>\n{_IM}assistant\n", "Sun.<|im_end|>"),
    "cohere": (
        'Action: ```json\n[\n    {\n        "tool_name": "sky",\n        "parameters": {"city": "Rome"}\n    }\n]```' + _END,
        f"{_TURN}<|SYSTEM_TOKEN|><results>\nsunny\n</results>{_END}{_TURN}<|CHATBOT_TOKEN|>",
        f"Sun.{_END}",
    ),
    "deepseek3": (
        '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>sky\n```json\n{"city": "Rome"}\n```'
        "<｜tool▁call▁end｜><｜tool▁calls▁end｜></s>",
        "<｜tool▁outputs▁begin｜><｜tool▁output▁begin｜>sunny<｜tool▁output▁end｜><｜tool▁outputs▁end｜>",
        "Sun.</s>",
    ),
    "glm4": ('sky\n{"city": "Rome"}<|observation|>', "\nsunny<|assistant|>", "\nSun.<|user|>"),
    "intern2": (
        '<|action_start|><|plugin|>\n{"name": "sky", "parameters": {"city": "Rome"}}<|action_end|><|im_end|>',
        f"\n{_IM}environment name=<|plugin|>\nsunny<|im_end|>\n{_IM}assistant\n",
        "Sun.<|im_end|>",
    ),
    "llama3": (
        '{"name": "sky", "parameters": {"city": "Rome"}}<|eot_id|>',
        "<|start_header_id|>ipython<|end_header_id|>\n\nsunny<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        "Sun.<|eot_id|>",
    ),
    "mistral": (
        '[TOOL_CALLS] [{"name": "sky", "arguments": {"city": "Rome"}, "id": "call00000"}]</s>',
        '[TOOL_RESULTS] {"content": "sunny", "call_id": "call00000"}[/TOOL_RESULTS]',
        " Sun.</s>",
    ),
    "qwen": (f"{_HERMES_CALL}<|im_end|>", f"\n{_IM}user\n{_RESPONSE}<|im_end|>\n{_IM}assistant\n", "Sun.<|im_end|>"),
    "vicuna": (f" {_HERMES_CALL}</s>", f"USER: {_RESPONSE} ASSISTANT:", " Sun.</s>"),
}


def stop_text(name: str, is_call: bool = False) -> str:
    """What the goldens end an answer with; the two GLM templates end a call with the mark of its result."""
    stop = GOLDENS[name][1].rpartition("Yes.")[2].strip()
    return "<|observation|>" if is_call and stop == "<|user|>" else stop
