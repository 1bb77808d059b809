# zai-org/GLM-4-32B-0414 as arguments of a Megatron run. Written by scripts/models/write.py: change glmconv/archs and run `make docs`.
MODEL_ARGS=(
    --num-layers 61
    --hidden-size 6144
    --ffn-hidden-size 23040
    --vocab-size 151552
    --disable-bias-linear
    --swiglu
    --untie-embeddings-and-output-weights
    --normalization RMSNorm
    --position-embedding-type rope
    --rotary-base 10000
    --rotary-interleaved
    --num-attention-heads 48
    --group-query-attention
    --num-query-groups 2
    --kv-channels 128
    --rotary-percent 0.5
    --spec slime_plugins.models.glm4 get_glm_spec
    --post-self-attn-layernorm
    --post-mlp-layernorm
    --no-rope-fusion
)
