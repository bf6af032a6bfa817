"""Fields of OpenAI's and vLLM's APIs that have no effect, or that cannot be served.

Sources: OpenAI's API reference, as its Python client types it; vLLM's `vllm/entrypoints/openai/protocol.py`."""

from typing import Annotated, Any

from minorca.serve.fields import Body, Unsupported


class UnservedFields(Body):
    """Those that both endpoints have."""

    # No effect.
    user: str = ""
    metadata: dict[str, Any] = {}
    store: bool = False
    service_tier: str = ""
    safety_identifier: str = ""
    prompt_cache_key: str = ""
    prompt_cache_retention: str = ""
    request_id: str = ""
    # Of text without special tokens, which this server returns.
    spaces_between_special_tokens: bool = True
    # Not supported. OpenAI's:
    functions: Annotated[Any, Unsupported([])] = []
    function_call: Annotated[Any, Unsupported("none", "auto")] = "none"
    modalities: Annotated[Any, Unsupported(["text"])] = ["text"]
    audio: Annotated[Any, Unsupported({})] = {}
    prediction: Annotated[Any, Unsupported({})] = {}
    web_search_options: Annotated[Any, Unsupported({})] = {}
    reasoning_effort: Annotated[Any, Unsupported("none")] = "none"
    verbosity: Annotated[Any, Unsupported("medium")] = "medium"
    # vLLM's: how tokens are chosen and returned
    use_beam_search: Annotated[Any, Unsupported(False)] = False
    early_stopping: Annotated[Any, Unsupported(False)] = False
    length_penalty: Annotated[Any, Unsupported(1)] = 1
    allowed_token_ids: Annotated[Any, Unsupported()] = None
    bad_words: Annotated[Any, Unsupported([])] = []
    logits_processors: Annotated[Any, Unsupported([])] = []
    skip_special_tokens: Annotated[Any, Unsupported(True)] = True
    include_stop_str_in_output: Annotated[Any, Unsupported(False)] = False
    return_tokens_as_token_ids: Annotated[Any, Unsupported(False)] = False
    return_token_ids: Annotated[Any, Unsupported(False)] = False
    # vLLM's: the prompt
    prompt_embeds: Annotated[Any, Unsupported([])] = []
    truncate_prompt_tokens: Annotated[Any, Unsupported()] = None
    mm_processor_kwargs: Annotated[Any, Unsupported({})] = {}
    cache_salt: Annotated[Any, Unsupported("")] = ""
    # vLLM's: constraints of the answer
    guided_json: Annotated[Any, Unsupported()] = None
    guided_regex: Annotated[Any, Unsupported("")] = ""
    guided_choice: Annotated[Any, Unsupported([])] = []
    guided_grammar: Annotated[Any, Unsupported("")] = ""
    guided_decoding_backend: Annotated[Any, Unsupported("")] = ""
    guided_whitespace_pattern: Annotated[Any, Unsupported("")] = ""
    structural_tag: Annotated[Any, Unsupported("")] = ""
    # vLLM's: its own operation
    priority: Annotated[Any, Unsupported(0)] = 0
    kv_transfer_params: Annotated[Any, Unsupported({})] = {}
    vllm_xargs: Annotated[Any, Unsupported({})] = {}


class UnservedChatFields(Body):
    """Those of chat completions."""

    # No effect.
    include_reasoning: bool = True
    chat_template_content_format: str = "auto"
    # Not supported.
    echo: Annotated[Any, Unsupported(False)] = False
    add_special_tokens: Annotated[Any, Unsupported(False)] = False
    documents: Annotated[Any, Unsupported([])] = []
    chat_template: Annotated[Any, Unsupported("")] = ""
    chat_template_kwargs: Annotated[Any, Unsupported({})] = {}
