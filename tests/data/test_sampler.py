import itertools
import logging
import math
import random
from collections import Counter

import pytest
import torch
from accelerate import skip_first_batches
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader

from peft_clsr import LanguageBatchIterable, LanguageBatchSampler


def random_case(seed):
    """Languages in mixed order, a batch size and a number of processes, with as many examples at least."""
    rng = random.Random(seed)
    languages = [language for language in "abcde"[: rng.randint(1, 5)] for _ in range(rng.randint(1, 40))]
    rng.shuffle(languages)
    return languages, rng.randint(1, 9), rng.randint(1, min(4, len(languages)))


def loader_of(sampler, process, dataset=None):
    """What `accelerator.prepare` makes of a `DataLoader` on one of several processes; examples are their indices."""
    dataset = range(10_000) if dataset is None else dataset
    return prepare_data_loader(
        DataLoader(dataset, batch_sampler=sampler, collate_fn=list),
        num_processes=sampler.num_replicas,
        process_index=process,
        even_batches=False,  # accelerate before 1.14 wants it
    )


def counts(sampler, languages):
    return Counter(languages[index] for batch in sampler for index in batch)


@pytest.mark.parametrize("seed", range(60))
def test_processes_share_every_example_once_in_as_many_batches_of_one_language(seed):
    languages, batch_size, processes = random_case(seed)
    sampler = LanguageBatchSampler(
        languages,
        batch_size,
        num_replicas=processes,
        lengths=[index % 7 for index in range(len(languages))] if seed % 3 == 0 else None,
        shuffle=seed % 3 != 1,
        seed=seed,
    )
    length = len(sampler)
    whole = sum(math.ceil(count / batch_size) for count in Counter(languages).values())
    assert length == math.ceil(whole / processes) * processes
    for _ in range(2):  # accelerate goes on to the next epoch
        shares = [list(loader_of(sampler, process)) for process in range(processes)]
        assert [len(share) for share in shares] == [length // processes] * processes
        batches = list(itertools.chain(*shares))
        assert all(1 <= len(batch) <= batch_size for batch in batches)
        assert all(len({languages[index] for index in batch}) == 1 for batch in batches)
        examples = sorted(itertools.chain(*batches))
        if length <= len(languages):
            assert examples == list(range(len(languages)))
        else:  # more batches than examples: a few come again
            assert len(examples) == length and set(examples) == set(range(len(languages)))


@pytest.mark.parametrize("process", [0, 1])
def test_process_takes_every_other_batch_of_the_sampler(process):
    sampler = LanguageBatchSampler(["ca"] * 20 + ["uk"] * 9, 4, num_replicas=2)
    loader = loader_of(sampler, process)
    assert len(loader) == 4
    assert list(loader) == list(sampler)[process::2]


def test_largest_batches_are_split_until_every_process_has_as_many():
    def sizes(examples, batch_size, processes):
        sampler = LanguageBatchSampler(["ca"] * examples, batch_size, num_replicas=processes, shuffle=False)
        return [len(batch) for batch in sampler]

    assert sizes(10, 4, 1) == [4, 4, 2]
    assert sizes(10, 4, 2) == [4, 2, 2, 2]
    assert sizes(10, 4, 5) == [2, 2, 2, 2, 2]
    assert sizes(5, 8, 4) == [2, 1, 1, 1]


def test_batches_that_cannot_be_split_are_filled_up_with_the_first():
    sampler = LanguageBatchSampler(["ca"] * 5, 1, num_replicas=3, shuffle=False)
    assert list(sampler) == [[0], [1], [2], [3], [4], [0]]
    assert len(sampler) == 6


@pytest.mark.parametrize(
    ("temperature", "expected"),
    [
        (1, {"ca": 100, "uk": 25, "ro": 4}),
        (2, {"ca": 100, "uk": 50, "ro": 20}),  # 100 · √(25/100), 100 · √(4/100)
        (5, {"ca": 100, "uk": 76, "ro": 53}),  # 75.8 and 52.5, rounded up
        (math.inf, {"ca": 100, "uk": 100, "ro": 100}),
    ],
)
def test_temperature_evens_out_languages(temperature, expected):
    languages = ["ca"] * 100 + ["uk"] * 25 + ["ro"] * 4
    sampler = LanguageBatchSampler(languages, 8, temperature=temperature, num_replicas=2)
    for epoch in range(3):
        sampler.set_epoch(epoch)
        assert counts(sampler, languages) == expected
        assert len(list(sampler)) == len(sampler)
        times = Counter(itertools.chain(*sampler))
        for index, language in enumerate(languages):
            rounds = expected[language] / languages.count(language)
            assert times[index] in (math.floor(rounds), math.ceil(rounds))


def test_rounding_errors_add_no_example():
    """25 · (7 / 25) > 7 in floating point."""
    assert counts(LanguageBatchSampler("a" * 25 + "b" * 7, 4), "a" * 25 + "b" * 7) == {"a": 25, "b": 7}


def test_further_rounds_over_a_language_have_an_order_of_their_own():
    sampler = LanguageBatchSampler(["ca"] * 100 + ["uk"] * 50, 50, temperature=math.inf)
    first, second = (batch for batch in sampler if min(batch) >= 100)
    assert sorted(first) == sorted(second) == list(range(100, 150))
    assert first != second


def test_order_depends_on_seed_and_epoch_alone():
    languages = ["ca"] * 30 + ["uk"] * 20

    def order(seed, epoch, lengths=None):
        sampler = LanguageBatchSampler(languages, 4, temperature=2, lengths=lengths, seed=seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(0, 0) != order(0, 1) != order(1, 0) != order(0, 0)
    for lengths in (None, list(range(50))):
        torch.manual_seed(1)
        random.seed(1)
        before = order(3, 5, lengths)
        torch.manual_seed(2)
        random.seed(2)
        state, python_state = torch.get_rng_state(), random.getstate()
        assert order(3, 5, lengths) == before
        assert torch.equal(torch.get_rng_state(), state) and random.getstate() == python_state


def test_same_epoch_is_the_same_when_iterated_again():
    sampler = LanguageBatchSampler(["ca"] * 30 + ["uk"] * 20, 4)
    assert list(sampler) == list(sampler)


def test_languages_are_spread_over_the_epoch():
    """Of a language with k of B batches, the first n have n · k / B, give or take 2."""
    languages = ["ca"] * 600 + ["uk"] * 150 + ["ro"] * 30
    sampler = LanguageBatchSampler(languages, 5)
    orders = set()
    for epoch in range(10):
        sampler.set_epoch(epoch)
        order = [languages[batch[0]] for batch in sampler]
        orders.add("".join(order))
        for language, share in Counter(order).items():
            for n in range(len(order)):
                assert abs(order[:n].count(language) - n * share / len(order)) <= 2
    assert len(orders) == 10


def test_without_shuffling_batches_are_dealt_in_proportion_in_the_order_of_the_dataset():
    sampler = LanguageBatchSampler(["ca", "uk", "ca", "ca", "ca", "uk", "ca", "ca"], 2, shuffle=False)
    assert list(sampler) == [[0, 2], [3, 4], [1, 5], [6, 7]]
    sampler.set_epoch(1)
    assert list(sampler) == [[0, 2], [3, 4], [1, 5], [6, 7]]


def test_lengths_give_batches_of_similar_lengths_in_shuffled_order():
    generator = random.Random(0)
    languages = ["ca"] * 400 + ["uk"] * 100
    lengths = [generator.randint(1, 3000) for _ in languages]

    def padding(batches):
        return sum(max(lengths[i] for i in batch) * len(batch) for batch in batches) / sum(lengths) - 1

    plain = LanguageBatchSampler(languages, 10)
    grouped = LanguageBatchSampler(languages, 10, lengths=lengths)
    assert padding(plain) > 0.7
    assert padding(grouped) < 0.25
    longest = [max(lengths[i] for i in batch) for batch in grouped]
    falls = sum(first > second for first, second in itertools.pairwise(longest))
    assert 0.35 < falls / (len(longest) - 1) < 0.65  # neither rising nor falling


def test_part_of_a_round_prefers_neither_long_nor_short_examples():
    """30 of 25 examples of lengths 0 to 24: the 5 that come again have a mean of 12."""
    languages = ["ca"] * 36 + ["uk"] * 25
    sampler = LanguageBatchSampler(languages, 5, temperature=2, lengths=[0] * 36 + list(range(25)))
    again = []
    for epoch in range(200):
        sampler.set_epoch(epoch)
        times = Counter(index for batch in sampler for index in batch if index >= 36)
        again += [index - 36 for index, count in times.items() if count == 2]
    assert len(again) == 5 * 200
    assert sum(again) / len(again) == pytest.approx(12, abs=0.75)


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("skipped", [0, 1, 5])
def test_resumed_epoch_is_exactly_the_rest(processes, skipped):
    languages = ["ca"] * 30 + ["uk"] * 21
    for process in range(processes):
        sampler = LanguageBatchSampler(languages, 4, num_replicas=processes, seed=7)
        sampler.set_epoch(2)
        expected = list(sampler)[process::processes]
        sampler = LanguageBatchSampler(languages, 4, num_replicas=processes, seed=7)
        loader = skip_first_batches(loader_of(sampler, process), skipped)
        loader.set_epoch(2)
        sampler.set_epoch(2)  # the loader's does not reach the sampler of several processes
        assert list(loader) == expected[skipped:]


@pytest.mark.parametrize("processes", [1, 2])
def test_prepared_loader_goes_on_to_the_next_epoch(processes):
    sampler = LanguageBatchSampler(["ca"] * 30, 4, num_replicas=processes)
    loader = loader_of(sampler, 0)
    epochs = [list(loader), list(loader)]
    for epoch in (0, 1):
        sampler.set_epoch(epoch)
        assert epochs[epoch] == list(sampler)[::processes]
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize(
    ("languages", "arguments", "message"),
    [
        ([], {}, "the dataset is empty"),
        (["ca"] * 2, {"num_replicas": 3}, "has 2 examples, fewer than the 3 processes"),
        (["ca"], {"batch_size": 0}, "batch_size is 0; expected at least 1"),
        (["ca"], {"num_replicas": 0}, "num_replicas is 0; expected at least 1"),
        (["ca"], {"temperature": 0.5}, "temperature is 0.5; expected at least 1"),
        (["ca"], {"temperature": math.nan}, "temperature is nan; expected at least 1"),
        (["ca"] * 3, {"lengths": [1, 2]}, "2 lengths for 3 examples"),
        (["ca"], {"lengths": [1], "shuffle": False}, "leave one of them out"),
        (["ca", None], {}, "example 1 has no language"),
    ],
)
def test_bad_arguments_of_the_sampler_are_refused(languages, arguments, message):
    with pytest.raises(ValueError, match=message):
        LanguageBatchSampler(languages, **{"batch_size": 2, **arguments})


def stream_of(languages):
    return [{"language": language, "index": index} for index, language in enumerate(languages)]


def index_tensor(batch):
    return torch.tensor([example["index"] for example in batch])


def shares_of(dataset, batch_size, processes):
    """Each process's batches, as lists of indices."""
    iterables = [
        LanguageBatchIterable(dataset, batch_size, num_replicas=processes, rank=rank) for rank in range(processes)
    ]
    return [[[example["index"] for example in batch] for batch in iterable] for iterable in iterables]


@pytest.mark.parametrize("seed", range(60))
def test_stream_is_shared_in_as_many_batches_of_one_language(seed, caplog):
    languages, batch_size, processes = random_case(seed)
    with caplog.at_level(logging.WARNING):
        shares = shares_of(stream_of(languages), batch_size, processes)
    assert len({len(share) for share in shares}) == 1
    batches = list(itertools.chain(*shares))
    assert all(1 <= len(batch) <= batch_size for batch in batches)
    assert all(len({languages[index] for index in batch}) == 1 for batch in batches)
    times = Counter(itertools.chain(*batches))
    dropped = len(languages) - len(times)
    assert dropped < processes
    warnings = [record.getMessage() for record in caplog.records]
    expected = f"dropped the last {dropped} of {len(languages)} examples of the stream, fewer than the {processes} "
    assert warnings == ([expected + "processes"] if dropped else [])
    assert sum(times.values()) - len(times) < processes  # those that come again, where no batch can be split


def test_stream_keeps_its_order_and_processes_take_turns():
    dataset = stream_of("aabbabab" + "a")
    assert shares_of(dataset, 2, 1) == [[[0, 1], [2, 3], [4, 6], [5, 7], [8]]]
    # Batches 0 to 3 are whole; of the rest, [8], there are fewer examples than processes.
    assert shares_of(dataset, 2, 2) == [[[0, 1], [4, 6]], [[2, 3], [5, 7]]]


def test_rest_of_a_stream_is_split_among_processes():
    # "a" is whole but alone, "b" is not: [0, 1, 2, 4] and [3] are split into three
    assert shares_of(stream_of("aaaba"), 4, 3) == [[[0, 1]], [[2, 4]], [[3]]]
    assert shares_of(stream_of("abc"), 4, 3) == [[[0]], [[1]], [[2]]]


@pytest.mark.parametrize("workers", [0, 1])
def test_stream_passes_a_prepared_loader_and_resumes(workers):
    expected = shares_of(stream_of("aabbabab"), 2, 1)[0]
    loader = DataLoader(
        LanguageBatchIterable(stream_of("aabbabab"), 2),
        batch_size=None,
        collate_fn=index_tensor,
        num_workers=workers,
    )
    loader = prepare_data_loader(
        loader, torch.device("cpu"), num_processes=1, process_index=0, put_on_device=True, dispatch_batches=False
    )
    assert [batch.tolist() for batch in loader] == expected
    assert [batch.tolist() for batch in skip_first_batches(loader, 1)] == expected[1:]


def test_several_workers_are_refused():
    loader = DataLoader(LanguageBatchIterable(stream_of("aa"), 2), batch_size=None, num_workers=2)
    with pytest.raises(ValueError, match="has 2 workers"):
        list(loader)


def test_epoch_reaches_a_dataset_that_shuffles():
    datasets = pytest.importorskip("datasets")
    streams = [datasets.Dataset.from_list(stream_of(name * 20)).to_iterable_dataset() for name in "ab"]
    dataset = datasets.interleave_datasets(streams, probabilities=[0.5, 0.5], seed=0).shuffle(seed=0, buffer_size=10)
    iterable = LanguageBatchIterable(dataset, 4)
    epochs = []
    for epoch in (0, 1, 0):
        iterable.set_epoch(epoch)
        epochs.append(list(iterable))
    assert epochs[0] == epochs[2] != epochs[1]
    LanguageBatchIterable(stream_of("a"), 1).set_epoch(1)  # a list has no epochs


@pytest.mark.parametrize(
    ("dataset", "arguments", "message"),
    [
        ([], {}, "the dataset is empty"),
        (stream_of("ab"), {"num_replicas": 3}, "has 2 examples, fewer than the 3 processes"),
        (stream_of("ab"), {"language_column": "lang"}, "example 0 .* in 'lang'; it has 'language', 'index'"),
        (stream_of(["a", None]), {}, "example 1 of the stream has no language in 'language'"),
        (stream_of("a"), {"batch_size": 0}, "batch_size is 0; expected at least 1"),
        (stream_of("a"), {"num_replicas": 2, "rank": 2}, "rank is 2; expected 0 to 1"),
    ],
)
def test_bad_streams_and_arguments_are_refused(dataset, arguments, message):
    with pytest.raises(ValueError, match=message):
        list(LanguageBatchIterable(dataset, **{"batch_size": 2, **arguments}))
