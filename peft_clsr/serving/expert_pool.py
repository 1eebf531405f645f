"""The experts that a replica has in memory."""

from __future__ import annotations

import logging
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from peft import PeftModel
from transformers import WhisperForConditionalGeneration

from ..inference.experts import expert_name, load_expert
from .catalog import Catalog

logger = logging.getLogger("ray.serve")  # whose messages Ray shows and keeps


class ExpertPool:
    """
    Loads experts at their first use, and releases those that were not used for longest.

    It is for one thread at a time. A thread that uses experts may let another one load and release others meanwhile.

    Args:
        model (`WhisperForConditionalGeneration`): The base model.
        catalog ([`Catalog`]): The experts.
        limit (`int`): Experts to keep in memory. More stay only while they are in use.
    """

    def __init__(self, model: WhisperForConditionalGeneration, catalog: Catalog, limit: int) -> None:
        self.model: WhisperForConditionalGeneration | PeftModel = model
        self.catalog, self.limit = catalog, limit
        self.loaded: dict[str, None] = {}  # names, the last used one last
        self._in_use: Counter[str] = Counter()
        if catalog.experts:
            # The first expert puts layers into the model, which nothing may use meanwhile; and it shows that they fit.
            self.load(catalog.experts[0][1].code)
            self.model = self.model.eval()

    def load(self, tag: str) -> str | None:
        """
        Load the expert of a language, unless it is in memory. Returns its name; `None` if there is none.

        Raises:
            ValueError, OSError: it cannot be loaded.
        """
        entry = self.catalog.expert(tag)
        if entry is None:
            return None
        name = expert_name(entry[1])
        if name in self.loaded:
            del self.loaded[name]
        else:
            logger.info("loads the expert %s", name)
            self.model = load_expert(self.model, *entry)
        self.loaded[name] = None
        return name

    @contextmanager
    def use(self, names: Iterable[str]) -> Iterator[None]:
        """Keep experts in memory within this context. After it, release those beyond the limit."""
        names = list(names)
        self._in_use.update(names)
        try:
            yield
        finally:
            self._in_use.subtract(names)
            self._release()

    def _release(self) -> None:
        for name in [name for name in self.loaded if not self._in_use[name]]:
            if len(self.loaded) <= self.limit:
                return
            logger.info("releases the expert %s", name)
            with warnings.catch_warnings():  # one of them is active, which no request depends on
                warnings.filterwarnings("ignore", message="Adapter .* was active which is now deleted")
                self.model.delete_adapter(name)
            del self.loaded[name]
