# %% [markdown]
# # Your first text model

# %%
import sys

from lmppl import LanguageModel

lm = LanguageModel.embedded("stories")
print("noise", file=sys.stderr)
lm.decode(lm.encode("Tom went to the kitchen."))
