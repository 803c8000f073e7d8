"""The program under the rules of Windows, which `pretended.py` describes."""

import gc
import signal
import sys
from pathlib import Path

import pytest
import torch
from helpers import interrupt_at, records_in
from pretended import pretended_windows

import additional_experiments as ae
from runner.data import features


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the test does not see which files are in use")
def test_a_story(options, monkeypatch, capfd):
    monkeypatch.setattr(features, "MIN_SECONDS", 0)
    repeated = [*options, "--repeats", "2", "--trainable_layers", "last_two_blocks", "--features", "disk"]
    saving = [*options, "--save_model", "spam.safetensors", "--plot", "run.svg"]
    assert ae.main([*repeated, "--feature_cache", "other", "--results", "other_results"]) == 0
    assert ae.main([*options, "--feature_cache", "", "--results", "other_results"]) == 0

    def kept():
        gc.collect()
        return {path.name for path in Path("kept").glob("*.npy")}

    with pretended_windows(monkeypatch):
        # A checkpoint that is replaced after each epoch, resumed in the second of two seeds.
        command = [*repeated, "--feature_cache", "kept", "--checkpoint", "run.ckpt"]
        with monkeypatch.context() as patch:
            interrupt_at(patch, torch.optim.AdamW, "step", 100, signal.SIGINT)
            assert ae.main(command) == 130
        capfd.readouterr()
        assert ae.main(command) == 0
        assert "Resuming from run.ckpt after 14 batches" in capfd.readouterr().out

        # Kept features that a run continues, another one reads, and a third one removes: there is room for one file.
        for further, how in (([], ", continued from 2 blocks"), ([], ", read from "), (["--seed", "7"], ", computed")):
            room = 1.5e-9 * max(path.stat().st_size for path in Path("kept").glob("*.npy")) if further else 1
            before = kept()
            assert ae.main([*saving, *further, "--feature_cache", "kept", "--feature_cache_gb", str(room)]) == 0
            out, err = capfd.readouterr()
            assert how in out and err == ""
        assert len(before) == 3 and len(kept()) == 1 and not before & kept()

        # A file that does not hold what is computed is replaced.
        [path] = Path("kept").glob("*.npy")
        path.write_bytes(path.read_bytes()[:128].ljust(path.stat().st_size, b"\0"))
        assert ae.main([*options, "--seed", "7", "--feature_cache", "kept"]) == 0
        out, err = capfd.readouterr()
        assert f" and kept in {path}" in out and err.count("\n") == 1 and f"{path} does not hold" in err

        assert ae.main(["--load_model", "spam.safetensors", "--classify", "You have won"]) == 0
        assert capfd.readouterr().out.endswith("\tYou have won\n")
        for _ in range(2):  # the second time in place of the first
            written = ["report.html", "report.csv", "report.png"]
            assert ae.main(["--report", "results", "--write", *written]) == 0
            assert all(Path(name).stat().st_size > 100 for name in written)
    expected = records_in("other_results")
    found = [record for record in records_in() if record["seed"] != 7]
    assert len(found) == 3 and sorted(map(str, found)) == sorted(map(str, expected))
    assert list(Path().glob("**/*.part*")) == []
