"""Chats and prompts as tokens: one way for training, rollouts and serving."""

from toolkit.chat.dropped import dropped_messages, hidden_documents, hidden_parts, hidden_tools
from toolkit.chat.images import PicturedTokens, has_images, pictured, read_image, take_images
from toolkit.chat.infilling import Infill, infill
from toolkit.chat.rust import rust_encoding
from toolkit.chat.template import ChatTemplateError, TemplateVariableError, render, render_spans
from toolkit.chat.tokens import Encoding, encode, prompt_token_ids, sequence_inputs, special_tokens_around
from toolkit.chat.training import ChatTokenizer, PreferenceTokens, TrainingTokens

__all__ = [
    "ChatTemplateError",
    "ChatTokenizer",
    "Encoding",
    "Infill",
    "PicturedTokens",
    "PreferenceTokens",
    "TemplateVariableError",
    "TrainingTokens",
    "dropped_messages",
    "encode",
    "has_images",
    "hidden_documents",
    "hidden_parts",
    "hidden_tools",
    "infill",
    "pictured",
    "prompt_token_ids",
    "read_image",
    "render",
    "render_spans",
    "rust_encoding",
    "sequence_inputs",
    "special_tokens_around",
    "take_images",
]
