"""Trainer's pushes to the Hub, for repositories with one folder per language."""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, HfApi
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import HubStrategy, SaveStrategy
from transformers.utils import PushInProgress, logging

from ..files import write_text
from ..hub.card import START, language_card
from ..hub.push import LANGUAGE_FILES, README, describe_adapter, push_folder
from ..hub.record import read_languages
from ..languages.adapters import adapter_languages
from ..tuner.adapter_names import adapter_folder

logger = logging.get_logger(__name__)


class LanguagePublisher:
    """
    Mixin for a `Trainer`. It pushes each adapter into its language's folder with [`push_folder`], and updates the
    model card of the repository, which may have further languages.

    Trainer itself would push the whole output folder. That would overwrite the repository's card, would push the last
    saved adapters unless they are named "default", and would publish `hub_token` in the pickled arguments.
    """

    def init_hf_repo(self, *args: Any, **kwargs: Any) -> None:
        for name, language in adapter_languages(self.accelerator.unwrap_model(self.model).peft_config).items():
            if language is None:
                raise ValueError(
                    f"adapter {name!r} is for no language, and folders on the Hub are named by language: set one with "
                    'CLSRConfig(language="ca")'
                )
        super().init_hf_repo(*args, **kwargs)
        self._hub = HfApi()  # one object: its background pushes run one after the other

    def create_model_card(
        self,
        *,
        dataset: str | None = None,
        metrics: Mapping[str, Mapping[str, Mapping[str, Any]]] | None = None,
        gate_means: Mapping[str, Mapping[str, float]] | None = None,
        **kwargs: Any,
    ) -> None:
        """
        Write the model card of the languages in `output_dir`, and each adapter's record beside it.

        Args:
            dataset (`str`, *optional*, defaults to `"evaluation set"`): Name of the evaluation set.
            metrics (`Mapping`, *optional*):
                Language code to results by test set, as in [`push_language`]. By default WER and CER of these weights'
                evaluation, if it used `make_compute_metrics`.
            gate_means (`Mapping`, *optional*): Language code to the result of `gate_means`, for the plot.
            kwargs: Further arguments of `Trainer.create_model_card`, which are ignored.
        """
        if not self.is_world_process_zero():
            return
        state = self.state
        step = state.best_global_step if self.args.load_best_model_at_end else None
        output_dir = Path(self.args.output_dir)
        self._write_records(output_dir, step or state.global_step, dataset, metrics or {}, gate_means or {})
        path = output_dir / README
        existing = path.read_bytes().decode("utf-8") if path.is_file() else ""
        repo_id = self.hub_model_id or self.args.hub_model_id or output_dir.absolute().name
        # A card without START is PEFT's empty template, written by each save.
        text = language_card(read_languages(output_dir), repo_id, existing if START in existing else None)
        write_text(path, text)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> CommitInfo | Future | None:
        """Push as `Trainer.push_to_hub` does, by language. `kwargs` are those of `create_model_card`."""
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self.create_model_card(**kwargs)
        self._finish_current_push()
        push = self._push(Path(self.args.output_dir), commit_message, token, revision)
        return push.result() if blocking else push

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        try:
            self._push_checkpoint(checkpoint_folder)
        except Exception as error:  # a card, the disk or the Hub must not end a training
            logger.warning(f"{checkpoint_folder} is not pushed ({type(error).__name__}: {error}); it is on the disk")

    def _finish_current_push(self) -> None:
        super()._finish_current_push()
        for job in getattr(getattr(self, "push_in_progress", None), "jobs", []):
            if job.done() and not job.cancelled() and job.exception() is not None:
                logger.warning(
                    f"a push to {self.hub_model_id} failed ({job.exception()}): the weights are in "
                    f"{self.args.output_dir}, push them again with trainer.push_to_hub()"
                )

    def _push_checkpoint(self, checkpoint_folder: str) -> None:
        strategy = HubStrategy(self.args.hub_strategy)
        if not self.is_world_process_zero() or strategy == HubStrategy.END:
            return
        in_progress = self.push_in_progress is not None and not self.push_in_progress.is_done()
        if in_progress and not self.args.hub_always_push:
            return
        self._write_records(Path(checkpoint_folder), self.state.global_step, None, {}, {})
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        # A copy: the checkpoint may be deleted or overwritten during the push.
        copied = Path(tempfile.mkdtemp())
        for folder in self._folders(Path(checkpoint_folder)).values():
            target = copied / folder.relative_to(checkpoint_folder)
            target.mkdir(exist_ok=True)
            for name in LANGUAGE_FILES:
                if (folder / name).is_file():
                    shutil.copyfile(folder / name, target / name)
        by_step = self.args.save_strategy == SaveStrategy.STEPS
        done = f"step {self.state.global_step}" if by_step else f"epoch {int(self.state.epoch)}"
        message = f"Training in progress, {done}"
        jobs = [self._push(copied, message, None, None, remove=True)]
        if strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            name = "last-checkpoint" if strategy == HubStrategy.CHECKPOINT else Path(checkpoint_folder).name
            jobs.append(
                self._hub.upload_folder(
                    repo_id=self.hub_model_id,
                    folder_path=checkpoint_folder,
                    path_in_repo=name,
                    commit_message=f"{message}, checkpoint",
                    token=self.args.hub_token,
                    revision=self.args.hub_revision,
                    run_as_future=True,
                    ignore_patterns=[TRAINING_ARGS_NAME],  # pickled, with the token
                )
            )
        if in_progress:
            self.push_in_progress.jobs.extend(jobs)
        else:
            self.push_in_progress = PushInProgress(jobs)

    def _push(
        self, folder: Path, message: str | None, token: str | None, revision: str | None, remove: bool = False
    ) -> Future:
        def push() -> CommitInfo:
            try:
                return push_folder(
                    folder,
                    self.hub_model_id,
                    private=self.args.hub_private_repo,
                    revision=revision or self.args.hub_revision,
                    commit_message=message or "End of training",
                    token=token or self.args.hub_token,
                )
            finally:
                if remove:
                    shutil.rmtree(folder)

        return self._hub.run_as_future(push)

    def _folders(self, folder: Path) -> dict[str, Path]:
        """The folder of each adapter that PEFT saved under `folder`, by name."""
        adapters = self.accelerator.unwrap_model(self.model).peft_config
        folders = {name: adapter_folder(folder, name) for name in adapters}
        return {name: path for name, path in folders.items() if (path / SAFETENSORS_WEIGHTS_NAME).is_file()}

    def _write_records(
        self, folder: Path, step: int, dataset: str | None, metrics: Mapping[str, Any], gate_means: Mapping[str, Any]
    ) -> None:
        """Write the record of each saved adapter, from which the model card is made."""
        model = self.accelerator.unwrap_model(self.model)
        for name, path in self._folders(folder).items():
            language = adapter_languages(model.peft_config)[name] or name
            describe_adapter(
                model,
                name,
                path,
                results=metrics.get(language) or self._evaluation_results(language, step, dataset or "evaluation set"),
                training_args=self.args,
                gate_means=gate_means.get(language),
            )

    def _evaluation_results(self, language: str, step: int, test_set: str) -> dict[str, dict[str, float]]:
        """WER and CER of a language in the last evaluation at a step, by test set; empty if there was none."""
        logs = [log for log in self.state.log_history if log.get("step") == step and f"eval_wer_{language}" in log]
        if not logs:
            return {}
        rates = {name: logs[-1].get(f"eval_{name}_{language}") for name in ("wer", "cer")}
        return {test_set: {name: rate for name, rate in rates.items() if rate is not None and math.isfinite(rate)}}
