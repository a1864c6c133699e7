"""What is known of the models that are ready to run without importing what runs them."""

from __future__ import annotations

from typing import NamedTuple

SETTINGS = "posterior", "paper"


class Entry(NamedTuple):
    """A model: what it infers, what ``--data`` takes, with an example line, and the options of ``--set``.

    ``infers`` is the first line of the docstring of the model's ``experiment``.
    """

    infers: str
    data: str
    example: str
    options: dict[str, str]
    maker: str = ""  # the function in `lmppl.models` that makes it; "": ``experiment`` in the module of this name
    lm: str = "LanguageModel"  # the class in `lmppl` of its language model


MAX_TOKENS = {"max_tokens": "the most tokens of a text before its stop"}
STORIES = "a text file, one story of three sentences per line"
STORY = "Tom had a dog. The dog was big. They ran to the park."
PROMPTS = "a text file, one prompt per line"
BOUNDS = "a text file, two integers per line"

MODELS = {
    "infilling": Entry(
        "The missing middle sentence of a story, given its beginning and its end.",
        STORIES,
        STORY,
        {"template": "the guide's prompt, with the fields {x} (beginning) and {y} (end)"},
    ),
    "continuation": Entry(
        "The next sentence after a prompt, from the language model with its sequences tempered.",
        PROMPTS,
        "Tom had a dog.",
        {"temperature": "T, or several for one guide, as 0.8 or [0.8, 0.9]"} | MAX_TOKENS,
    ),
    "reverse": Entry("The beginning of a story, given how it goes on.", STORIES, STORY, {}),
    "contrastive": Entry(
        "What is likely after one prompt and unlikely after another: p(z|x)^a / p(z|x')^b.",
        "a text file, two prompts per line with a tab between them",
        "Tom had a dog.\tMia saw a cat.",
        {"a": "the power of p(z|x), positive", "b": "the power of p(z|x'), not negative"}
        | MAX_TOKENS
        | {"differ": "how the two embedded prompts differ: characters or objects"},
    ),
    "constrained": Entry(
        "Texts that satisfy a condition, in the language model's own proportions: words, a pattern or a classifier.",
        PROMPTS + "; needs words, pattern or labelled",
        "Tom had a dog.",
        {
            "constraint": "lexical, regex or learned",
            "words": "for lexical: the words to contain, with commas between alternatives",
            "pattern": "for regex: a regular expression of the whole text",
            "labelled": "for learned: a text file, per line 0 or 1, a tab and a text",
        }
        | MAX_TOKENS,
    ),
    "preferences": Entry(
        "Texts for people who disagree, in proportion to their shares; tastes are inferred from choices.",
        "a JSONL file, one choice per line; needs properties",
        '{"annotator": "1", "prompt": "Tom had a dog.", "chosen": " It was old.", "rejected": " It was new."}',
        {
            "properties": "what can be liked, such as old, new; cake|egg: at most one property of each group",
            "kinds": "the most kinds of annotators",
            "strength": "the utility of a liked property, nats",
            "beta": "how much the utility counts in the target",
        }
        | MAX_TOKENS,
    ),
    "diffusion": Entry(
        "The missing middle sentence of a story, by a masked language model that unmasks it word by word.",
        STORIES,
        STORY,
        {
            "order": "the order of the model's unmasking: random, left-to-right, confidence or learned",
            "guide_order": "the order of the guide's; default: as order",
            "reader": "the causal language model that reads the end; default: the embedded one",
        },
        lm="MaskedLanguageModel",
    ),
    "transfer": Entry(
        "Texts of many tasks by one guide that reads their descriptions; tested on a combination that it never saw.",
        "a JSONL file, one task per line: what comes before, what follows, words and a temperature, as far as known",
        '{"x": "Tom had a dog.", "y": " They ran to the park.", "w": " dog ball", "T": 0.7}',
        {
            "families": "to train on: infilling, reverse, lexical, tempered, two endings",
            "strength": "how much it counts that a text contains one of the words, nats",
        }
        | MAX_TOKENS,
    ),
    "random_number": Entry(
        "A random integer between 0 and 100: uniform, whatever the language model prefers.",
        BOUNDS,
        "0 100",
        {"target": "uniform or valid", "unseen": "true: test on bounds that no training prompt had"},
    ),
    "random_number_bounds": Entry(
        "A random integer between bounds that no training prompt had: uniform.",
        "none: it has its own bounds",
        "",
        {},
        "random_number.bounds_experiment",
    ),
    "random_number_valid": Entry(
        "A random integer between 0 and 100: the language model's own, conditioned on validity.",
        BOUNDS,
        "0 100",
        {},
        "random_number.valid_experiment",
    ),
    "subjectivity": Entry(
        "The reason why a sentence is called objective or subjective.",
        "a JSONL file, per line a sentence and label; or a directory of train.10.jsonl or train.jsonl and test.jsonl",
        '{"text": "a film without a plot", "label_text": "subjective"}',
        {"reads": "what the guide reads: xy or x", "count": "how many labelled sentences to train on"},
    ),
    "uncertainty": Entry(
        "How much of a label's uncertainty is due to chance, to reasons and to parameters.",
        "none: it has its own sentences",
        "",
        {"count": "how many labelled sentences each adapter is trained on", "members": "how many adapters"},
    ),
    "arithmetic": Entry(
        "The chain of thought between a sum and its answer, with a calculator.",
        "a directory of train_50.json, train_questions_1000.json, test_3_operands.json and test_4_operands.json, "
        "each a JSON list",
        '[{"str_query": "Question: 6 - 0 - 4 = ? Answer:", "num_sol": 2, "str_rationale": "6 - 0 =, 6 - 4 ="}]',
        {
            "sees_answer": "true: the guide reads the answer, and cannot predict it",
            "warm_start": "steps of supervised fine-tuning on the rationales",
        },
    ),
    "thoughts": Entry(
        "The thoughts between a question and its answer: a plan of some steps, or a tree of which one path counts.",
        "a text file, per line a question, a tab and its answer",
        "Tom has 6 eggs and eats 2. How many are left?\t4",
        {"children": "1: plans; more: trees with up to so many children"},
    ),
}
