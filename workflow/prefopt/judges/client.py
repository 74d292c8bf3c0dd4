"""A client of OpenAI-compatible chat servers: bounded concurrency, retries, and a key that is shown nowhere."""

from __future__ import annotations

import asyncio
import email.utils
import logging
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import httpx2
from tenacity import (
    AsyncRetrying,
    RetryCallState,
    retry_if_exception_type,
    wait_random_exponential,
)

from prefopt.errors import BadInput, PrefoptError, TryAgain
from prefopt.json_text import parsed_json

log = logging.getLogger(__name__)

Reply = TypeVar("Reply")
Request = Mapping[str, Any]

_ASK_LATER = frozenset({408, 409, 425, 429})
_REFUSED_KEY = frozenset({401, 403})
_REFUSED_REQUEST = frozenset({400, 413, 422})
_THIS_ONE_ONLY = re.compile(r"context[ _](length|window|size)|content_(filter|policy)", re.IGNORECASE)
_LOGPROBS = ("logprobs", "top_logprobs")
_LONGEST_WAIT = 60.0
_LONGEST_RETRY_AFTER = 600.0
_ENDS = (signal.SIGTERM, signal.SIGINT)
_GO_ON = "answers so far are kept, run again to go on"


class _Trouble(Exception):
    """Something that may pass; ``wait`` is how many seconds the server asked for."""

    def __init__(self, what: str, wait: float = 0.0) -> None:
        super().__init__(what)
        self.wait = wait


@dataclass
class _Round(Generic[Reply]):
    """The requests of one call, who takes the replies, and what has gone wrong; ``stopped``: send nothing new."""

    http: httpx2.AsyncClient
    waiting: Iterator[tuple[int, Request]]
    read: Callable[[Any], Reply]
    refused: Callable[[str], Reply]
    keep: Callable[[int, Reply], None]
    failures: list[Exception] = field(default_factory=list)
    stopped: asyncio.Event = field(default_factory=asyncio.Event)

    def fail(self, error: Exception) -> None:
        self.failures.append(error)
        self.stopped.set()

    async def sleep(self, seconds: float) -> None:
        """Wait, but not longer than until the round is stopped."""
        with suppress(TimeoutError):
            async with asyncio.timeout(max(0.0, seconds)):
                await self.stopped.wait()


@dataclass
class ChatClient:
    """Posts to ``<base_url>/chat/completions``, at most ``concurrency`` requests at a time.

    429, 408, 409, 425, 5xx, replies that take longer than ``timeout_seconds`` as a whole, cut connections and replies
    that are no chat completion are tried again up to ``retries`` times, after ``first_wait`` seconds that double each
    time (at random below that, at most a minute) or after the server's Retry-After, whichever is longer; Retry-After
    holds back every other request too.
    """

    base_url: str
    api_key: str | None = field(default=None, repr=False)
    key_name: str | None = None
    concurrency: int = 8
    timeout_seconds: float = 60.0
    retries: int = 6
    first_wait: float = 1.0
    _not_before: float = field(default=0.0, init=False, repr=False)
    _plain: bool = field(default=False, init=False, repr=False)

    def ask_all(
        self,
        requests: Sequence[Request],
        read: Callable[[Any], Reply],
        refused: Callable[[str], Reply],
        keep: Callable[[int, Reply], None],
    ) -> None:
        """Send all requests; ``keep(number, reply)`` as each reply arrives, where reply is ``read(content)``.

        A request that the server will not take for its own length or content has the reply ``refused(what it says)``.
        After a failure, SIGTERM or Ctrl-C nothing new is sent, but what is on its way is waited for and kept. Raises
        TryAgain then, or where a request fails to the end, and BadInput where the server refuses all requests.
        """
        logging.getLogger("httpx2").setLevel(logging.WARNING)  # it tells of every request at the level info
        asyncio.run(self._ask_all(requests, read, refused, keep))

    async def _ask_all(
        self,
        requests: Sequence[Request],
        read: Callable[[Any], Reply],
        refused: Callable[[str], Reply],
        keep: Callable[[int, Reply], None],
    ) -> None:
        headers = {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        limits = httpx2.Limits(max_connections=self.concurrency)
        async with httpx2.AsyncClient(headers=headers, timeout=None, limits=limits) as http:
            asking = _Round(http, iter(enumerate(requests)), read, refused, keep)
            with _stopped_by_signals(asking):
                await asyncio.gather(*(self._work(asking) for _ in range(self.concurrency)))
        if asking.failures:
            raise asking.failures[0]

    async def _work(self, asking: _Round[Reply]) -> None:
        while not asking.failures and (drawn := next(asking.waiting, None)) is not None:
            number, request = drawn
            try:
                asking.keep(number, await self._patient(asking, request))
            except _Trouble as trouble:
                asking.fail(TryAgain(f"{self.base_url}: {trouble}, {self.retries + 1} times; {_GO_ON}"))
            except Exception as error:  # told after the answers on their way have arrived and been kept
                asking.fail(error)

    async def _patient(self, asking: _Round[Reply], request: Request) -> Reply:
        retrying = AsyncRetrying(
            retry=retry_if_exception_type(_Trouble),
            stop=lambda state: bool(asking.failures) or state.attempt_number > self.retries,
            wait=self._wait,
            sleep=asking.sleep,
            reraise=True,
        )
        return await retrying(self._once, asking, request)

    def _wait(self, state: RetryCallState) -> float:
        backoff = wait_random_exponential(multiplier=self.first_wait, max=_LONGEST_WAIT)(state)
        trouble = state.outcome.exception() if state.outcome is not None else None
        asked = trouble.wait if isinstance(trouble, _Trouble) else 0.0
        self._not_before = max(self._not_before, time.monotonic() + asked) if asked else self._not_before
        return max(backoff, asked)

    async def _once(self, asking: _Round[Reply], request: Request) -> Reply:
        await asking.sleep(self._not_before - time.monotonic())
        if asking.failures:
            raise _Trouble("stopped")
        body = {key: value for key, value in request.items() if not (self._plain and key in _LOGPROBS)}
        try:
            async with asyncio.timeout(self.timeout_seconds):
                response = await asking.http.post(f"{self.base_url.rstrip('/')}/chat/completions", json=body)
        except TimeoutError:
            raise _Trouble(f"no reply within {self.timeout_seconds:g} s") from None
        except (httpx2.TransportError, httpx2.DecodingError) as error:
            raise _Trouble(f"no reply ({type(error).__name__})") from None
        status = response.status_code
        if status in _ASK_LATER or status >= 500:
            raise self._later(response)
        if status in _REFUSED_REQUEST and "logprobs" in body and "logprobs" in response.text:
            log.warning("%s: refuses requests for log-probabilities; only its texts are read", self.base_url)
            self._plain = True
            return await self._once(asking, request)
        if status in _REFUSED_REQUEST and _THIS_ONE_ONLY.search(response.text):
            return asking.refused(f"HTTP {status}, {self._said(response)}")
        if status != 200:
            raise self._refusal(response)
        try:
            return asking.read(parsed_json(response.content))
        except (AttributeError, LookupError, TypeError, ValueError, OverflowError):
            raise _Trouble("a reply that is no chat completion") from None

    def _later(self, response: httpx2.Response) -> Exception:
        wait = retry_after(response.headers.get("retry-after", ""))
        if wait > _LONGEST_RETRY_AFTER:
            return TryAgain(f"{self.base_url}: HTTP {response.status_code}, it asks to wait {wait:.0f} s; {_GO_ON}")
        if wait > _LONGEST_WAIT:
            log.warning("%s: HTTP %d, it asks to wait %.0f s", self.base_url, response.status_code, wait)
        return _Trouble(f"HTTP {response.status_code}", wait)

    def _refusal(self, response: httpx2.Response) -> PrefoptError:
        if response.status_code in _REFUSED_KEY:  # such replies may quote the key
            key = f"the key in the environment variable {self.key_name}" if self.key_name else "requests without a key"
            return BadInput(
                f"{self.base_url}: HTTP {response.status_code}, the server refuses {key}; set 'api_key_env' in "
                "judges.yaml"
            )
        said = self._said(response)
        return BadInput(f"{self.base_url}: HTTP {response.status_code}, the server refuses the request: {said}")

    def _said(self, response: httpx2.Response) -> str:
        return (response.text.replace(self.api_key, "***") if self.api_key else response.text)[:300]


@contextmanager
def _stopped_by_signals(asking: _Round[Any]) -> Iterator[None]:
    """The first SIGTERM or Ctrl-C stops the round, so that answers on their way are kept; a second one ends at once."""
    if threading.current_thread() is not threading.main_thread():  # only there can signals be handled
        yield
        return
    loop = asyncio.get_running_loop()

    def stop(number: signal.Signals) -> None:
        give_back()
        asking.fail(TryAgain(f"stopped by {number.name}; {_GO_ON}"))

    def give_back() -> None:
        for number in _ENDS:
            loop.remove_signal_handler(number)

    for number in _ENDS:
        loop.add_signal_handler(number, stop, number)
    try:
        yield
    finally:
        give_back()


def retry_after(header: str) -> float:
    """Seconds that a Retry-After header asks for, given as a number or as a date; 0 for anything else."""
    try:
        return max(0.0, float(header))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(header).timestamp() - time.time())
    except (TypeError, ValueError):
        return 0.0
