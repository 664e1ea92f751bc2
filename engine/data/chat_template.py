"""The chat template that prepared datasets were made with."""

from collections.abc import Sequence

from engine.data.dataset import TokenDataset
from model.vocabulary.template import CHAT_TEMPLATE, unmarked
from model.vocabulary.tokenizer import Tokenizer


def with_template_of(datasets: Sequence[TokenDataset], tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer with the chat template of the data, which the model learns; with its own where the data names none.

    Raises: ValueError naming two datasets with different templates.
    """
    named = {data.report["template"]: data for data in datasets if data.report.get("template")}
    forms = {unmarked(source).strip(): source for source in named}
    if len(forms) > 1:
        first, second, *_ = (named[source].folder for source in forms.values())
        raise ValueError(f"{first} and {second} were prepared with different chat templates: prepare both with the same one")
    own = CHAT_TEMPLATE if tokenizer.template is None else tokenizer.template.source
    if not forms or unmarked(own).strip() in forms:
        return tokenizer
    return tokenizer.with_template(next(iter(forms.values())))
