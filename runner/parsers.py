"""Parsers of single values of the command line: numbers, model sizes, context lengths, paths of pictures."""

import argparse
import importlib.util
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


def page(text):
    """The path of a page for a browser."""
    if Path(text).suffix not in (".html", ".htm"):
        raise argparse.ArgumentTypeError(f'"{text}" does not end in .html')
    return text


IMAGE_FORMATS = (".png", ".pdf", ".svg")


def image(text):
    """The path of a picture that matplotlib can draw."""
    if Path(text).suffix not in IMAGE_FORMATS:
        raise argparse.ArgumentTypeError(f'"{text}" does not end in {", ".join(IMAGE_FORMATS)}')
    if not importlib.util.find_spec("matplotlib"):
        raise argparse.ArgumentTypeError("pictures need matplotlib, which is not installed: pip install matplotlib")
    return text
