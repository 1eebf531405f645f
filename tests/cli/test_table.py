"""The table of results: which rates it shows."""

import pytest

from peft_clsr.cli.table import RESULTS_HEADER, rates_text, results_rows

RATES = {"wer": 0.25, "cer": 0.125, "utterances": 4}


@pytest.mark.parametrize("language, wer, text", [("ca", "25.0", "WER 25.0 %, CER 12.5 %"), ("th", "", "CER 12.5 %")])
def test_a_language_without_spaces_has_no_wer(language, wer, text):
    row = {"base": RATES, "expert": RATES, "trainable_parameters": 10, "trainable_share": 0.1}
    for cells in results_rows({"settings": {}, "languages": {language: row}}, language):
        cells = dict(zip(RESULTS_HEADER, cells, strict=True))
        assert (cells["WER %"], cells["CER %"]) == (wer, "12.5")
    assert rates_text(RATES, language) == text
