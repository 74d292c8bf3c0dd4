"""Any OpenAI-compatible server as judge: what is sent, and how a reply becomes a raw answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prefopt.judges.answers import RawAnswer
from prefopt.judges.client import ChatClient
from prefopt.judges.pairwise import Keep
from prefopt.judges.templates import JudgeTemplate, Question


@dataclass(frozen=True)
class ServerJudge:
    """Asks for one label at temperature 0, with the log-probabilities of the candidates where the server has them."""

    client: ChatClient
    model_name: str
    template: JudgeTemplate
    labels: Sequence[str]
    top_logprobs: int
    answer_tokens: int

    def ask(self, questions: Sequence[Question], keep: Keep) -> None:
        """Ask concurrently; raises as ``ChatClient.ask_all``."""
        self.client.ask_all([self._request(question) for question in questions], raw_answer, _unanswered, keep)

    def _request(self, question: Question) -> dict[str, Any]:
        return {
            "model": self.model_name,
            "messages": self.template.messages(question, self.labels),
            "max_tokens": self.answer_tokens,
            "temperature": 0.0,
            "logprobs": True,
            "top_logprobs": self.top_logprobs,
        }


def raw_answer(reply: Mapping[str, Any]) -> RawAnswer:
    """The first choice of a chat completion; LookupError, TypeError or ValueError where it is none."""
    choice = reply["choices"][0]
    text = choice["message"]["content"]
    places = (choice.get("logprobs") or {}).get("content") or []
    candidates: dict[str, float] = {}
    for entry in places[0]["top_logprobs"] if places else []:
        # the likeliest of equal spellings is first
        candidates.setdefault(_unicode(str(entry["token"])), float(entry["logprob"]))
    usage = reply.get("usage") or {}
    return RawAnswer(
        text=_unicode(text) if isinstance(text, str) else "",
        top_logprobs=candidates or None,
        tokens_in=max(0, int(usage.get("prompt_tokens") or 0)),
        tokens_out=max(0, int(usage.get("completion_tokens") or 0)),
    )


def _unicode(text: str) -> str:
    """A text that can be kept: a server that cuts characters in two may send half of one."""
    return text.encode(errors="replace").decode()


def _unanswered(said: str) -> RawAnswer:
    return RawAnswer(f"not answered: {said}", final=False)
