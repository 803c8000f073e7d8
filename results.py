"""What a run leaves behind: its accuracies and its row of the table."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Accuracy:
    """`correct` of `total` messages classified as their label says; prints as a percentage."""

    correct: int
    total: int

    @property
    def fraction(self):
        return self.correct / self.total if self.total else float("nan")

    def __str__(self):
        return f"{self.fraction * 100:.2f}%"


@dataclass(frozen=True)
class Published:
    """The published figures of a row: accuracies in percent, minutes on an A100."""

    train: float
    validation: float
    test: float
    minutes: float

    def __str__(self):
        return f"{self.train:.2f}% / {self.validation:.2f}% / {self.test:.2f}%, {self.minutes:.2f} min (A100)"


@dataclass(frozen=True)
class Result:
    """The finished run in the table's terms. `row` and `published` are None where the options are no row's."""

    row: int | None
    model_size: str
    weights: str
    position: str
    layers: str
    context: str
    train: Accuracy
    validation: Accuracy
    test: Accuracy
    minutes: float
    device: str
    remarks: str
    published: Published | None

    def cells(self):
        return {
            "Row": self.row or "-",
            "Model": self.model_size,
            "Weights": self.weights,
            "Trainable token position": self.position,
            "Trainable layers": self.layers,
            "Context length": self.context,
            "Training acc": self.train,
            "Validation acc": self.validation,
            "Test acc": self.test,
            "Training time": f"{self.minutes:.2f} min",
            "CPU/GPU": self.device,
            "Remarks": self.remarks or "-",
            "Published": self.published or "-",
        }


def markdown_line(cells):
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"


def markdown_header(result):
    """The two lines that stand above a row to make it a Markdown table."""
    return markdown_line(result.cells()) + "\n" + markdown_line("---" for _ in result.cells())


def markdown_row(result):
    return markdown_line(result.cells().values())
