"""Training objectives: causal, masked-language-model and UL2 samples; `registry` names them."""
