"""`posttrain convert`: any data format → canonical JSONL, with an account of every row."""

from posttrain import flags
from posttrain.config import Config
from posttrain.data.convert import convert


def run(config: Config) -> None:
    """Convert and print the report."""
    wanted = config.group(flags.ConvertFlags)
    print(convert(wanted.in_file, wanted.out_file, wanted.data_type, wanted.file_type, wanted.bad_rows).summary())
