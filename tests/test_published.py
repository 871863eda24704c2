"""Published reports are what their records say, and the records are whole."""

import tarfile

import pandas as pd
import pytest

from methods.core.job.files import ROOT
from reports.tree import read_results, tidy
from reports.verify import verify

ARCHIVES = sorted((ROOT / "reports/published").glob("*/records.tar.xz"))


@pytest.mark.parametrize("archive", ARCHIVES, ids=[archive.parent.name for archive in ARCHIVES])
def test_a_published_report_has_the_numbers_of_its_records(archive, tmp_path):
    with tarfile.open(archive) as file:
        file.extractall(tmp_path, filter="data")
    (matrix,) = tmp_path.glob("results/*/matrix.json")
    published = pd.read_parquet(archive.parent / "summary/results.parquet")
    pd.testing.assert_frame_equal(tidy(read_results(matrix)), published)
    checked = verify(matrix.parent, tensors=False)
    assert not checked.missing + checked.deviations
