"""Too little text stops before anything is measured, with one line that names counts which really fit."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from invarlock.checkpoints.side import Loading, read_side
from invarlock.core.exceptions import PairingError
from invarlock.evidence.windows import Windows
from invarlock.flow.certify import CertifyRequest, open_request
from invarlock.flow.job import resolved_metric
from invarlock.flow.sampling import cut_windows

_FITS = re.compile(r"dataset\.preview_n: (\d+) and dataset\.final_n: (\d+) fit")


def _cut(
    model: Path, file: Path, counts: tuple[int, int], tokens: int, profile: str = "ci"
) -> tuple[Windows, int, str]:
    """Windows cut of a file, their scored tokens, and what was noted."""
    sample = {"preview": counts[0], "final": counts[1], "min_tokens": tokens}
    dataset = {"provider": "local_jsonl", "file": str(file), "seq_len": 48}
    request = CertifyRequest(
        str(model), str(model), profile=profile, dataset=dataset, overrides={"sample": sample}, device="cpu"
    )
    job = open_request(request)
    side = read_side(job.adapter, str(model), Loading(), tensors=False)
    job.metric = resolved_metric("auto", job.adapter)
    windows = cut_windows(job, side, request.dataset)
    return windows, job.scored(windows), "; ".join(job.notes)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("counts", "tokens"), [((2000, 2000), 3000), ((2000, 1000), 3000), ((10, 10), 3000), ((30, 10), 3000)]
)
def test_the_counts_that_are_named_fit_and_reach_the_floor_of_tokens(
    demo_model: Path, text_file: Path, counts: tuple[int, int], tokens: int
) -> None:
    with pytest.raises(PairingError) as caught:
        _cut(demo_model, text_file, counts, tokens)
    assert caught.value.code == "E001" and "\n" not in str(caught.value)
    found = _FITS.search(str(caught.value))
    assert found is not None, caught.value
    fitting = (int(found[1]), int(found[2]))
    windows, held, _ = _cut(demo_model, text_file, fitting, tokens)
    assert (len(windows.preview), len(windows.final)) == fitting and held >= tokens


@pytest.mark.slow
@pytest.mark.parametrize("counts", [(2000, 2000), (10, 10)])
def test_where_no_counts_fit_the_line_says_how_much_more_text_would(
    demo_model: Path, text_file: Path, counts: tuple[int, int]
) -> None:
    with pytest.raises(PairingError, match=r"no counts fit, so give \d+\.\d times as much text") as caught:
        _cut(demo_model, text_file, counts, 10**6)
    assert "expects 1,000,000" in str(caught.value)


@pytest.mark.slow
def test_text_that_is_one_document_is_said_to_be(demo_model: Path, text_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text(text_file.read_text(encoding="utf-8"), encoding="utf-8")
    with pytest.raises(
        PairingError, match=r"all of the text is one document \(notes\.txt\).*one line of a \.jsonl file"
    ):
        _cut(demo_model, path, (10, 10), 100)
    assert "one document (notes.txt)" in _cut(demo_model, path, (10, 10), 100, "dev")[2]
