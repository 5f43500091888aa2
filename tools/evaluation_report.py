"""Reports of an evaluation: a table, JSON, and a picture."""

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cosyvoice.utils.file_utils import atomic_write
from tools.measures import STOPS_EARLY_RATIO, TALKS_ON_RATIO, WRONG_TEXT_FLOOR, Clip, Delivery, Figures, figures
from tools.packages import optional

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NOT_MEASURED = "–"
WIDTH_INCHES, HEIGHT_INCHES, DOTS_PER_INCH = 10, 9, 120


@dataclass
class Evaluation:
    """The results of an evaluation, and what they were made from."""

    made_with: dict[str, Any]  # options and voice
    pace_seconds_per_character: float
    spoken: list[Clip]
    originals: list[Clip]
    delivery: Delivery | None  # of what was spoken here

    @cached_property
    def figures(self) -> dict[str, Figures]:
        """Return the figures of the spoken clips, of each seed if there are several, and of the originals.

        The originals show the best figures that can be reached.
        """
        seeds = dict.fromkeys(clip.seed for clip in self.spoken)
        found = {"spoken": figures(self.spoken, self.delivery)}
        if len(seeds) > 1:
            found |= {f"seed {seed}": figures([clip for clip in self.spoken if clip.seed == seed]) for seed in seeds}
        return found | {"originals": figures(self.originals)}

    @property
    def has_base_voices(self) -> bool:
        return any(voice.nearest_base for voice in self.figures["originals"].voices.values())

    def notes(self) -> list[str]:
        """Return notes that a reader of the figures must know."""
        notes = []
        for name, found in self.figures.items():
            for unit, content in found.contents.items():
                control = content.wrong_text_error
                if control is not None and control < WRONG_TEXT_FLOOR:
                    notes.append(f"{name}: {unit} errors mean little, because wrong texts have only {control:.2f}")
        if "phoneme" not in self.figures["originals"].contents:
            notes.append("phonemes are judged in English only")
        if not self.has_base_voices:
            notes.append("margins are not measured without recordings of the base voices (--base-voices)")
        return notes


def table(evaluation: Evaluation) -> str:
    columns = [column(found) for found in evaluation.figures.values()]
    rows = [("", *evaluation.figures)]
    rows += [(label, *(cells[label] for cells in columns)) for label in columns[0]]
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows]
    return "\n".join([*lines, *(f"note: {note}" for note in evaluation.notes())])


def column(found: Figures) -> dict[str, str]:
    """Return the cells of one set of clips by label."""
    cells = {"sentences": str(found.sentences)}
    for unit, content in found.contents.items():
        cells[f"{unit} error"] = number(content.error)
        cells[f"  against wrong texts (at least {WRONG_TEXT_FLOOR}, {unit}s)"] = number(content.wrong_text_error)
    cells |= {
        "DNSMOS overall": number(found.quality.ovr),
        "duration ratio": number(found.duration_ratio),
        "  lowest and highest": " ".join(map(number, found.duration_ratio_range)),
        f"  sentences that talk on (above {TALKS_ON_RATIO})": str(found.talk_on),
        f"  sentences that stop early (below {STOPS_EARLY_RATIO})": str(found.stop_early),
    }
    for judge, voice in found.voices.items():
        cells[f"similarity ({judge})"] = number(voice.similarity)
        nearest = f"{voice.nearest_base} " if voice.nearest_base else ""
        cells[f"  nearest base voice ({judge})"] = nearest + number(voice.nearest_base_similarity)
        cells[f"  margin over it ({judge})"] = number(voice.margin)
        cells[f"  sentences nearer to a base voice ({judge})"] = number(voice.nearer_to_a_base)
        cells[f"  sentences without a voice ({judge})"] = number(voice.without_voice)
    return cells | {
        "real-time factor": number(found.delivery.real_time_factor),
        "seconds to the first sound (streams)": number(found.delivery.first_sound_seconds),
        "largest jump at a seam, 1 is the speech's own (streams)": number(found.delivery.seam_jump),
    }


def number(value: float | None) -> str:
    if value is None:
        return NOT_MEASURED
    return str(value) if isinstance(value, int) else f"{value:.3f}"


def write_json(evaluation: Evaluation, path: Path) -> None:
    content = evaluation.made_with | {
        "pace_seconds_per_character": evaluation.pace_seconds_per_character,
        "talks_on_above_ratio": TALKS_ON_RATIO,
        "stops_early_below_ratio": STOPS_EARLY_RATIO,
        "notes": evaluation.notes(),
        "figures": {name: asdict(found) for name, found in evaluation.figures.items()},
        "clips": {name: list(map(asdict, getattr(evaluation, name))) for name in ("spoken", "originals")},
    }
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def draw(evaluation: Evaluation, path: Path) -> None:
    """Draw errors, duration and similarity of every sentence, first of the spoken clips, then of the originals."""
    with optional():
        from matplotlib.figure import Figure

    judge = next(iter(evaluation.spoken[0].voices))
    figure = Figure((WIDTH_INCHES, HEIGHT_INCHES), layout="constrained")
    errors, durations, voices = figure.subplots(3, sharex=True)
    plot(errors, evaluation, "word error", lambda clip: clip.contents["word"].error_rate)
    if "phoneme" in evaluation.spoken[0].contents:
        plot(errors, evaluation, "x: phoneme error", lambda clip: clip.contents["phoneme"].error_rate, "x", "tab:red")
    plot(durations, evaluation, "duration ratio", lambda clip: clip.duration_ratio)
    plot(voices, evaluation, f"similarity ({judge})", lambda clip: target_similarity(clip, judge))
    for threshold in (TALKS_ON_RATIO, STOPS_EARLY_RATIO):
        durations.axhline(threshold, color="tab:red", linestyle=":")
    if evaluation.has_base_voices:
        plot(voices, evaluation, "x: nearest base voice", lambda clip: base_similarity(clip, judge), "x", "tab:red")
    voices.set_xlabel(f"sentence: {len(evaluation.spoken)} spoken | {len(evaluation.originals)} originals")
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=DOTS_PER_INCH)


def plot(
    axes: "Axes",
    evaluation: Evaluation,
    label: str,
    value: Callable[[Clip], float],
    mark: str = "o",
    colour: str = "tab:blue",
) -> None:
    """Draw a mark for each sentence, and a line between the two sets."""
    values = [value(clip) for clip in (*evaluation.spoken, *evaluation.originals)]
    axes.plot(range(1, len(values) + 1), values, mark, color=colour)
    axes.axvline(len(evaluation.spoken) + 0.5, color="black", linewidth=0.8)
    axes.set_ylabel("\n".join(filter(None, [axes.get_ylabel(), label])))


def target_similarity(clip: Clip, judge: str) -> float:
    voice = clip.voices[judge]
    return voice.target if voice else math.nan


def base_similarity(clip: Clip, judge: str) -> float:
    voice = clip.voices[judge]
    return max(voice.bases.values()) if voice else math.nan
