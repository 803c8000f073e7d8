"""What was measured, in words: for the report as text and for its page."""


def in_ranges(numbers):
    """[1, 2, 3, 5] as `1–3, 5`."""
    parts = []
    for number in numbers:
        if parts and parts[-1][1] == number - 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ", ".join(f"{first}" if first == last else f"{first}–{last}" for first, last in parts)


def where(mean, published):
    """Whether a published figure in percent lies inside the interval of an Accuracy."""
    low, high = mean.interval
    return "inside" if low <= published / 100 <= high else "outside"


def against_published(mean, published):
    """The published figure, the difference from it in points, and whether it lies inside the measured interval."""
    difference = round(mean.fraction * 100 - published, 2) + 0.0  # never -0.00
    return f"{published:.2f}, {difference:+.2f}, {where(mean, published)}"


def minutes_cell(group):
    """Mean minutes ± standard deviation."""
    minutes, deviation = group.minutes
    return f"{minutes:.2f}{f' ± {deviation:.2f}' if len(group.records) > 1 else ''} min"


def describe(answer):
    """What was measured, in a sentence."""
    comparison, question = answer.comparison, answer.question
    sentence = f"Row {question.b}: {comparison.verdict}"
    if not comparison.is_identical:
        low, high = (100 * end for end in comparison.interval)
        difference = 100 * comparison.difference
        sentence += (
            f": {difference:+.2f} points (95% {low:+.1f} to {high:+.1f}), p {p_value(comparison)}; {runs(answer)}"
        )
    return f"{sentence}{f'; {answer.remark}' if answer.remark else ''}."


def runs(answer):
    """What runs a comparison is of; of one run each it says nothing about the next."""
    comparison, question = answer.comparison, answer.question
    if comparison.only is None:
        return f"{comparison.runs[0]} and {comparison.runs[1]} seeds"
    only_a, only_b = comparison.only
    return f"of these two runs; only row {question.a} right: {only_a}, only row {question.b}: {only_b}"


def unanswered(answers):
    """{why: pairs of rows} of the questions without a comparison."""
    found = {}
    for answer in answers:
        if not answer.comparison:
            found.setdefault(answer.remark, []).append(f"{answer.question.a}–{answer.question.b}")
    return {why: ", ".join(pairs) for why, pairs in found.items()}


def p_value(comparison):
    """The corrected p-value as text."""
    p = comparison.p if comparison.p_corrected is None else comparison.p_corrected
    return "< 0.001" if p < 0.001 else f"= {p:.3f}" if p < 0.1 else f"= {p:.2f}"
