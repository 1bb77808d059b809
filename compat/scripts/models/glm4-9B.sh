# zai-org/GLM-4-9B-0414 as arguments of a Megatron run. Written by scripts/models/write.py: change glmconv/archs and run `make docs`.
MODEL_ARGS=(
    --num-layers 40
    --hidden-size 4096
    --ffn-hidden-size 13696
    --vocab-size 151552
    --disable-bias-linear
    --swiglu
    --untie-embeddings-and-output-weights
    --normalization RMSNorm
    --position-embedding-type rope
    --rotary-base 10000
    --rotary-interleaved
    --num-attention-heads 32
    --group-query-attention
    --num-query-groups 2
    --kv-channels 128
    --add-qkv-bias
    --rotary-percent 0.5
    --spec slime_plugins.models.glm4 get_glm_spec
    --post-self-attn-layernorm
    --post-mlp-layernorm
    --no-rope-fusion
)
