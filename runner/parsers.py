"""Parsers of single values of the command line: numbers, model sizes, context lengths, paths of pictures."""

import argparse
import math
import re
from pathlib import Path

from previous_chapters import GPT_SIZES, GPTConfig

INT64 = -(2**63), 2**63 - 1  # the range of PyTorch's integers


def number(kind, minimum=None, above=None, maximum=None):
    """A parser of finite numbers of `kind` (int or float) from `minimum` to `maximum` and greater than `above`.

    A parser returns the value of a text, or raises argparse.ArgumentTypeError that says what is wrong with it.
    """
    if kind is int:
        minimum, maximum = INT64[0] if minimum is None else minimum, INT64[1] if maximum is None else maximum

    def parse(text):
        value = parse_number(kind, text)
        if above is not None and value <= above:
            raise argparse.ArgumentTypeError(f"{text} is not greater than {above}")
        if minimum is not None and value < minimum:
            raise argparse.ArgumentTypeError(f"{value} is less than {minimum}")
        if maximum is not None and value > maximum:
            raise argparse.ArgumentTypeError(f"{value} is more than {maximum}")
        return value

    return parse


def parse_number(kind, text):
    """The finite number of `kind` (int or float) that a text is. Raises argparse.ArgumentTypeError."""
    try:
        if kind is int and re.fullmatch(r"[+-]?\d+", text):
            return int(text)  # which refuses thousands of digits
        if kind is float and math.isfinite(value := float(text)):
            return value
    except ValueError:
        pass
    name = "whole" if kind is int else "finite"
    raise argparse.ArgumentTypeError(f'"{text}" is not a {name} number')


def model_size(text):
    """The name of a model size, from itself or its part before the bracket."""
    for name in GPT_SIZES:
        if text in (name, name.split(" ")[0]):
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
