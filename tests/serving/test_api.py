"""What clients get when copies of the model die or fail. The handle of Ray is a stand-in, the client is openai's."""

import asyncio

import pytest

pytest.importorskip("ray.serve")
openai = pytest.importorskip("openai")
httpx2 = pytest.importorskip("httpx2")

from ray.exceptions import ActorDiedError, ActorUnavailableError
from ray.serve.exceptions import BackPressureError

from peft_clsr.inference.subtitles import Transcript
from peft_clsr.serving.api import Api, make_application
from peft_clsr.serving.catalog import make_catalog
from peft_clsr.serving.errors import ApiError
from peft_clsr.serving.settings import Settings

DIED = ActorDiedError()
UNAVAILABLE = ActorUnavailableError("gone", b"0" * 16)
HEARD = Transcript("ca", "ca", 1.0, [{"start": 0.0, "end": 1.0, "text": " un"}])


class Handle:
    """Gives one answer after another."""

    def __init__(self, answers):
        self.answers, self.asked, self.transcribe = list(answers), [], self

    async def remote(self, *arguments):
        self.asked.append(arguments)
        answer = self.answers.pop(0)
        if isinstance(answer, Exception) and not isinstance(answer, ApiError):
            raise answer
        return answer


@pytest.fixture
def ask(models, recordings):
    """Sends one request to a service whose copies answer so. Returns the answer or error, and what they were asked."""

    def send(*answers):
        handle = Handle(answers)
        settings = Settings("tiny", "tiny", 0, "cpu", "float32", 1, 1, 8, 2, 10**6, 20.0, 9)
        api = Api(settings, make_catalog(str(models / "tiny"), [], []), handle)
        transport = httpx2.ASGITransport(make_application(api), raise_app_exceptions=False)

        async def create():
            http = openai.DefaultAsyncHttpxClient(transport=transport)
            client = openai.AsyncOpenAI(base_url="http://a/v1", api_key="x", http_client=http, max_retries=0)
            with recordings[0].path.open("rb") as file:
                return await client.audio.transcriptions.create(model="tiny", file=file, language="ca")

        try:
            return asyncio.run(create()), handle.asked
        except openai.APIStatusError as error:
            return error, handle.asked

    return send


def test_a_request_of_a_copy_that_dies_goes_to_another_one(ask, recordings):
    answer, asked = ask(DIED, UNAVAILABLE, HEARD)
    assert answer.text == "un"
    assert len(asked) == 3 and asked[0] == asked[1] == asked[2]
    assert asked[0][0] == recordings[0].path.read_bytes()


def test_a_recording_at_which_copies_die_does_not_kill_them_all(ask):
    error, asked = ask(DIED, DIED, DIED, HEARD)
    assert len(asked) == 3
    assert (
        error.status_code == 503 and error.body["code"] == "overloaded" and "3 replicas died" in error.body["message"]
    )


@pytest.mark.parametrize(
    ("answer", "status", "code"),
    [
        (BackPressureError(num_queued_requests=9, max_queued_requests=9), 503, "overloaded"),
        (RuntimeError("out of memory"), 500, "internal_error"),
        (
            ApiError(500, "the expert of 'ca' cannot be loaded: x", "language", "expert_unavailable"),
            500,
            "expert_unavailable",
        ),
    ],
    ids=["full", "failed", "expert"],
)
def test_failures_are_openais_errors_and_are_not_sent_again(ask, answer, status, code):
    error, asked = ask(answer, HEARD)
    assert (error.status_code, error.body["code"], error.type) == (status, code, "server_error")
    assert len(asked) == 1
