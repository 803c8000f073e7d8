"""Parsers of single values of the command line: numbers, model sizes, context lengths, paths of pictures."""

import argparse
import math
from pathlib import Path

from previous_chapters import GPT_SIZES, GPTConfig


def number(kind, minimum=-(2**63), above=-math.inf, maximum=2**63 - 1):
    """A parser of numbers of `kind` (int or float) from `minimum` to `maximum`, by default the range of int64.

    A parser returns the value of a text, or raises argparse.ArgumentTypeError that says what is wrong with it.
    """

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not -math.inf < value < math.inf:  # neither is NaN
            raise argparse.ArgumentTypeError(f'"{text}" is not a {"whole" if kind is int else "finite"} number')
        if value <= above:
            raise argparse.ArgumentTypeError(f"{value} is not greater than {above}")
        if value < minimum:
            raise argparse.ArgumentTypeError(f"{value} is less than {minimum}")
        if value > maximum:
            raise argparse.ArgumentTypeError(f"{value} is more than {maximum}")
        return value

    return parse


def model_size(text):
    """The name of a model size, from itself or a part of it: "gpt2-xl (1558M)", "gpt2-xl" or "xl"."""
    for name in GPT_SIZES:
        if text in (name, name.split(" ")[0], name.split(" ")[0].removeprefix("gpt2-")):
            return name
    hint = ""
    if (start := text.find("--")) > 0:
        hint = f'; is a space missing before "{text[start:]}"?'
    raise argparse.ArgumentTypeError(f'"{text}" is none of {", ".join(GPT_SIZES)}{hint}')


MAX_CONTEXT = GPTConfig.context_length


def context_length(text):
    """A number of tokens, or the name of one."""
    names = ("longest_training_example", "model_context_length")
    if text in names:
        return text
    try:
        return number(int, 1, maximum=MAX_CONTEXT)(text)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{error}; use {', '.join(names)} or 1 to {MAX_CONTEXT}") from None


IMAGE_FORMATS = (".png", ".pdf", ".svg")


def image(text, suffixes=IMAGE_FORMATS):
    """The path of a picture that matplotlib can draw, or of a file with another of `suffixes`."""
    if Path(text).suffix not in suffixes:
        raise argparse.ArgumentTypeError(f'"{text}" does not end in {", ".join(suffixes)}')
    return text


def report_file(text):
    """The path of a file that `--report --write` can write."""
    return image(text, (".html", ".md", ".csv", ".tex", *IMAGE_FORMATS))
