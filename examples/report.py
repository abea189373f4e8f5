"""The demo's page: loss curves and answers side by side, one self-contained HTML file."""

from __future__ import annotations

import html
from pathlib import Path

WIDTH, HEIGHT, MARGIN = 640, 260, 46
COLOURS = ("#4269d0", "#3ca951", "#d5553f")
TITLES = {"before": "before SFT", "sft": "after SFT", "dpo": "after DPO", "ppo": "after PPO"}
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 1060px; margin: 2rem auto; padding: 0 1rem; color: #1d2430 }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2rem }
table { border-collapse: collapse } td, th { padding: .3rem 1.2rem .3rem 0; text-align: left; border-bottom: 1px solid #dde2ea }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 1rem } .pair > div { background: #f5f7fa; padding: .8rem; border-radius: 6px }
pre { white-space: pre-wrap; font: inherit; margin: .3rem 0 } .when { color: #5b6675; font-size: .85rem }
svg text { font: 12px system-ui, sans-serif; fill: #5b6675 }
"""


def curve_svg(curves: dict[str, list[tuple[float, float]]]) -> str:
    """Line chart over steps, one line a series."""
    points = [point for series in curves.values() for point in series]
    steps, losses = [p[0] for p in points], [p[1] for p in points]
    left, right, low, high = min(steps), max(max(steps), 1), *_margin(min(losses), max(losses))

    def place(step: float, loss: float) -> tuple[float, float]:
        x = MARGIN + (step - left) / max(right - left, 1) * (WIDTH - 2 * MARGIN)
        y = HEIGHT - MARGIN + (low - loss) / max(high - low, 1e-9) * (HEIGHT - 2 * MARGIN)
        return round(x, 1), round(y, 1)

    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(", ".join(curves))} over steps" width="{WIDTH}">'
    ]
    for tick in range(5):
        loss = low + (high - low) * tick / 4
        x, y = place(left, loss)
        parts.append(f'<line x1="{x}" x2="{WIDTH - MARGIN}" y1="{y}" y2="{y}" stroke="#e3e7ee"/>')
        parts.append(f'<text x="{x - 8}" y="{y + 4}" text-anchor="end">{loss:.2f}</text>')
    for index, (name, series) in enumerate(curves.items()):
        line = " ".join(f"{x},{y}" for x, y in (place(*p) for p in series))
        colour = COLOURS[index % len(COLOURS)]
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts.append(f'<text x="{WIDTH - MARGIN - 110}" y="{18 + 16 * index}" style="fill:{colour}">{html.escape(name)}</text>')
    parts.append(f'<text x="{MARGIN}" y="{HEIGHT - 12}">step {left:g}</text>')
    parts.append(f'<text x="{WIDTH - MARGIN}" y="{HEIGHT - 12}" text-anchor="end">step {right:g}</text>')
    return "".join([*parts, "</svg>"])


def _margin(low: float, high: float) -> tuple[float, float]:
    space = 0.05 * max(high - low, 1e-6)
    return low - space, high + space


def write_page(report: dict, results: list[tuple[str, str, str]], path: Path) -> None:
    """Write the report as a page. `results`: what was measured, before, after."""
    table = "".join(f"<tr><td>{name}</td><td>{before}</td><td>{after}</td></tr>" for name, before, after in results)
    samples = "".join(
        f"<h3>{html.escape(s['question'])}</h3><div class=pair>"
        + "".join(
            f"<div><span class=when>{TITLES.get(name, name)}</span><pre>{html.escape(said.strip())}</pre></div>"
            for name, said in s.items()
            if name != "question"
        )
        + "</div>"
        for s in report["answers"]
    )
    page = (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>posttrain demo</title><style>{STYLE}</style>"
        f"<h1>posttrain demo: {html.escape(report['model'])} learns a house style</h1>"
        f"<p>Continued pretraining, supervised fine-tuning, a reward model, DPO and PPO, each with LoRA on what came before;"
        f" {report['minutes']} minutes on this machine.</p>"
        f"<table><tr><th>on 40 held-out questions or pairs</th><th>before</th><th>after</th></tr>{table}</table>"
        f"<h2>Loss</h2>{curve_svg(report['curves'])}"
        f"<h2>PPO: score</h2>{curve_svg(report['ppo_curve'])}<h2>Held-out questions</h2>{samples}</html>"
    )
    path.write_text(page, encoding="utf-8")
