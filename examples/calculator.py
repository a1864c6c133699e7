"""A tool inside a language model: which sums does a model mean whose text ends with "=8", if it cannot add?"""

import pyro
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lmppl import LanguageModel
from lmppl.distributions import Completion
from lmppl.inference import SMC, Enumeration
from lmppl.ngram import NGram, NGramConfig
from lmppl.tools import Calculator

# A bigram model of "3+4=": digits and operators in turn, small digits more often, and any digit after "=".
tokens = ["<eos>", *"0123456789", "+", "="]
backend = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}))
backend.pre_tokenizer, backend.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")
network = NGram(NGramConfig(vocab_size=len(tokens), eos_token_id=0, bos_token_id=0))
is_digit = torch.tensor([token.isdigit() for token in tokens])
digits = torch.where(is_digit, -torch.arange(len(tokens)) / 5, -torch.inf)
operators = torch.where(is_digit, -torch.inf, torch.tensor([-torch.inf, *[0.0] * 12]))
network.table.data = torch.where(torch.cat([is_digit, torch.tensor([False])])[:, None], operators, digits)
lm = LanguageModel(network, tokenizer)


def sums(tools):
    z = pyro.sample("z", Completion(lm, "", max_tokens=5, stop=None, tools=tools))  # digit, operator, digit, ...
    right = (z[..., 1] == lm.token_id("+")) & (z[..., 3:] == lm.encode("=8")).all(-1)
    pyro.factor("?+?=8", torch.where(right, 0.0, -torch.inf))


pyro.set_rng_seed(0)
for name, tools in {"by itself": (), "with the calculator": (Calculator(),)}.items():
    exact = Enumeration(sums).run(tools)
    print(f"{name}: probability {exact.log_evidence.exp():.5f} of ?+?=8")
    print("   ", ", ".join(f"{s} {p:.3f}" for s, p in exact.table("z")[:7]))
    found = SMC(sums, num_particles=10_000).run(tools)
    print(f"    by SMC {found.log_evidence.exp():.5f}")
