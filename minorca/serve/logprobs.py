"""Log-probabilities as responses write them."""

from minorca.generate.request import PromptToken
from minorca.serve.choice import TokenLogprob, TokenTexts, clamp_logprob


def chat_logprobs(tokens: list[TokenLogprob]) -> dict:
    """OpenAI's object for chat completions."""

    def entry(text: str, logprob: float | None) -> dict:
        # The bytes of an incomplete character cannot be read off its text.
        return {"token": text, "bytes": None if "\ufffd" in text else list(text.encode()), "logprob": logprob}

    content = [
        entry(token.text, token.logprob) | {"top_logprobs": [entry(text, logprob) for text, logprob in token.top]}
        for token in tokens
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(tokens: list[TokenLogprob], has_top: bool) -> dict:
    """OpenAI's object for completions."""

    def top(token: TokenLogprob) -> dict[str, float] | None:
        if token.logprob is None:
            return None
        # With the sampled token. Of several tokens with the same text, the most likely one is kept.
        entries = [*token.top, (token.text, token.logprob)]
        return dict(reversed(entries))

    return {
        "tokens": [token.text for token in tokens],
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": [top(token) for token in tokens] if has_top else None,
        "text_offset": [token.offset for token in tokens],
    }


def prompt_logprobs(prompt: list[int], scores: list[PromptToken], count: int, texts: TokenTexts) -> list[dict | None]:
    """vLLM's list: null, then an object for each prompt token after the first, with the `count` most likely ids and it.

    Args:
        prompt: the prompt's ids.
        scores: of the ids after the first.
    """

    def entry(i: int, logprob: float, rank: int) -> dict:
        return {"logprob": clamp_logprob(logprob), "rank": rank, "decoded_token": texts[i]}

    def of_token(i: int, score: PromptToken) -> dict:
        ranked = enumerate(score.top[:count], 1)
        return {str(i): entry(i, score.logprob, score.rank)} | {
            str(other): entry(other, logprob, rank) for rank, (other, logprob) in ranked if other != i
        }

    return [None, *(of_token(i, score) for i, score in zip(prompt[1:], scores))]
