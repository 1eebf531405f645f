"""`peft-clsr push` and `peft-clsr languages`, with a Hub server on this machine."""

import pytest
from huggingface_hub.errors import HTTPError
from peft import get_peft_model

from peft_clsr import CLSRConfig, HubLanguage
from peft_clsr.cli import main
from peft_clsr.cli.run_folder import write_results


@pytest.fixture
def experts(tiny_whisper, tmp_path):
    """A folder of random experts of Catalan and Romanian."""
    model = get_peft_model(tiny_whisper(), CLSRConfig.paper(language="ca", expert_rank=2), adapter_name="ca")
    model.add_adapter("ro", CLSRConfig.paper(language="ro"))
    model.save_pretrained(tmp_path / "experts")
    return tmp_path / "experts"


def test_the_languages_of_a_folder_are_pushed_and_listed(experts, hub, capsys):
    assert main(["languages", str(experts)]) == 0
    local = capsys.readouterr().out
    assert main(["push", str(experts), "me/experts", "--commit_message", "Two languages"]) == 0
    assert "pushed: " in capsys.readouterr().out
    assert {"ca/adapter_model.safetensors", "ro/adapter_model.safetensors"} <= set(hub.files("me/experts"))
    assert main(["languages", "me/experts"]) == 0
    listed = capsys.readouterr().out
    for printed in (local, listed):
        assert "| ca       | Catalan  | ca " in printed and "| rank 2 |" in printed and "| full   |" in printed
    hub.create("me/others")
    assert main(["push", str(experts), "me/others", "--create_pr"]) == 0
    assert "/discussions/1" in capsys.readouterr().out


def test_an_expert_whose_training_was_stopped_is_not_pushed(experts, hub, capsys):
    write_results({"settings": {}, "languages": {"ca": {}}, "unfinished": {"ro": {}}}, experts)
    for folder in (experts, experts / "ro"):
        with pytest.raises(SystemExit) as exit:
            main(["push", str(folder), "me/experts"])
        message = capsys.readouterr().err
        assert exit.value.code == 2 and f"{experts}: the training of ro is not finished" in message
        assert "--resume_from_checkpoint true, or push the folders of finished languages alone" in message
    assert main(["push", str(experts / "ca"), "me/experts"]) == 0


def test_each_language_is_listed_with_the_rate_to_read(monkeypatch, tmp_path, capsys):
    results = {"my/set": {"wer": 0.9, "cer": 0.1}}
    found = [HubLanguage(code, code, code, results=results) for code in ("ca", "ja")] + [HubLanguage("th", "th", "th")]
    for languages, header, cells in (
        (found, ["WER %", "CER %"], [["90.0", ""], ["", "10.0"], ["", ""]]),
        (found[:1], ["MB", "WER %"], [["", "90.0"]]),
    ):
        monkeypatch.setattr("peft_clsr.hub.record.read_languages", lambda folder, languages=languages: languages)
        assert main(["languages", str(tmp_path)]) == 0
        rows = [[cell.strip() for cell in line.split("|")][-3:-1] for line in capsys.readouterr().out.splitlines()]
        assert [rows[0], *rows[2:]] == [header, *cells]


@pytest.mark.parametrize("arguments", [["languages", "me/nothing"], ["languages", "."], ["push", ".", "me/experts"]])
def test_what_is_no_repository_or_has_no_languages_is_an_error(hub, tmp_path, capsys, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    assert exit.value.code == 2 and "error: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["push", "expert", "me/experts"], "there is no folder 'expert'; did you mean 'experts'?"),
        (["push", "experts", "my experts"], "'my experts' is no name of a repository, expected one such as me/"),
        (["languages", "./expert"], "does not exist, expected adapters: a folder; did you mean 'experts'?"),
        (["languages", "file"], "file is a file, expected adapters: a folder, or a repository on the Hub"),
        (["convert", "fiel", "out"], "there is no file fiel; did you mean 'file'?"),
        (["convert", "file", "file/out"], "output_dir file/out would be in "),
    ],
    ids=" ".join,
)
def test_a_mistyped_path_or_repository_is_named(experts, tmp_path, capsys, monkeypatch, arguments, named):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    assert exit.value.code in (1, 2) and named in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_hub_that_cannot_be_reached_is_named(experts, capsys, monkeypatch):
    def no_connection(*args, **kwargs):
        raise type("ConnectError", (HTTPError,), {})("[Errno -2] Name or service not known")

    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", no_connection)
    with pytest.raises(SystemExit) as exit:
        main(["push", str(experts), "me/experts"])
    assert exit.value.code == 1 and "error: the Hub cannot be reached ([Errno -2] Name" in capsys.readouterr().err


def test_a_push_that_the_hub_refuses_ends_with_its_reason(experts, hub, capsys):
    with pytest.raises(SystemExit) as exit:
        main(["push", str(experts), "somebody/experts"])
    assert exit.value.code == 1 and "403" in capsys.readouterr().err
