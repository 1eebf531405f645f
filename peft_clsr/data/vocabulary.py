"""Maps token ids between two Whispers. They may differ: large-v3 has one more language."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

# Repositories spell this token in two ways.
_RENAMED = {"<|nocaptions|>": "<|nospeech|>"}


@dataclass
class VocabularyMap:
    """
    The ids of the same tokens in the student's and in the teacher's vocabulary.

    Args:
        student_ids (`torch.Tensor`): int64 [common], ascending: the tokens that both have.
        teacher_ids (`torch.Tensor`): int64 [common], the same tokens in the teacher's vocabulary.
        student_tokens (`int`): Number of tokens of the student's tokenizer.
        teacher_tokens (`int`): Number of tokens of the teacher's tokenizer.

    Example:

    ```py
    >>> vocabulary = VocabularyMap.between(student_processor.tokenizer, teacher_processor.tokenizer)
    >>> student_logits[..., vocabulary.student_ids]  # one column of each is the same token
    >>> teacher_logits[..., vocabulary.teacher_ids]
    ```
    """

    student_ids: torch.Tensor
    teacher_ids: torch.Tensor
    student_tokens: int
    teacher_tokens: int
    _table: torch.Tensor = field(init=False, repr=False, compare=False)

    def __post_init__(self):
        # The last row is for every id without a common token.
        self._table = torch.full((int(self.student_ids.max()) + 2,), -100)
        self._table[self.student_ids] = self.teacher_ids

    @classmethod
    def between(cls, student_tokenizer: Any, teacher_tokenizer: Any) -> VocabularyMap:
        """
        Match the tokens of two tokenizers by their strings.

        Args:
            student_tokenizer (`WhisperTokenizer`): The student's.
            teacher_tokenizer (`WhisperTokenizer`): The teacher's.

        Raises:
            ValueError: the teacher has less than half of the student's tokens.
        """
        student, teacher = _ids_by_token(student_tokenizer), _ids_by_token(teacher_tokenizer)
        common = sorted((token_id, teacher[token]) for token, token_id in student.items() if token in teacher)
        if 2 * len(common) < len(student):
            raise ValueError(
                f"the teacher's vocabulary has {len(common)} of the student's {len(student)} tokens, expected nearly "
                "all of them: these are not the tokenizers of two Whispers"
            )
        student_ids, teacher_ids = torch.tensor(common, dtype=torch.long).unbind(dim=1)
        return cls(student_ids.contiguous(), teacher_ids.contiguous(), len(student), len(teacher))

    @property
    def is_identity(self) -> bool:
        """
        True if both tokenizers have the same tokens with the same ids.

        An output layer may have more rows than its tokenizer has tokens (padding, or the timestamps that older
        tokenizers lack). Logits can be compared without this map if it is the identity and both layers have equally
        many rows. Otherwise compare the columns of the common tokens.
        """
        same_size = len(self.student_ids) == self.student_tokens == self.teacher_tokens
        return same_size and torch.equal(self.student_ids, self.teacher_ids)

    def teacher_labels(self, labels: list[int] | torch.Tensor) -> list[int] | torch.Tensor:
        """
        Translate the student's labels to the teacher's ids.

        Args:
            labels (`list[int]` or `torch.Tensor`): int64 [...] student ids, or -100.

        Returns:
            `list[int]` or `torch.Tensor`: of the same kind and shape, -100 where the teacher lacks the token.
        """
        ids = torch.as_tensor(labels, dtype=torch.long)
        last = len(self._table) - 1
        mapped = self._table.to(ids.device)[torch.where((ids < 0) | (ids > last), last, ids)]
        return mapped if isinstance(labels, torch.Tensor) else mapped.tolist()


def _ids_by_token(tokenizer: Any) -> dict[str, int]:
    return {_RENAMED.get(token, token): token_id for token, token_id in tokenizer.get_vocab().items()}
