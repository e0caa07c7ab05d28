"""The same training steps by transformers and PEFT on this device: tokens a second and peak memory.

LoRA of rank 8 on q, k, v, o, embedding and norms trained, gradient checkpointing, AdamW, clipping; s2 is the same group
pattern through scaled_dot_product_attention. Weights are random and its own, so losses are not those of steps.py.
"""

import functools
import gc
import statistics
import time

from benchmarks.gpu.part import Part


def main() -> None:
    """Every step that ours takes with remat block and unpacked rows, by cuDNN's backend and by flash."""
    part = Part(__doc__)
    import jax

    jax.config.update("jax_platforms", "cpu")  # for the planner's formula; the GPU is torch's
    import torch
    from peft import LoraConfig, get_peft_model
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM

    from benchmarks.gpu.sizes import MODELS, TINY, Step, steps_for
    from benchmarks.train_step import grouped_attention

    cuda = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if cuda else ("cpu", torch.float32)
    name = torch.cuda.get_device_name() if cuda else "cpu"
    part.head = {"device": name, "torch": torch.__version__, "cudnn": torch.backends.cudnn.version()}
    limit = torch.cuda.mem_get_info()[1] if cuda else 0
    steps = TINY if part.tiny else steps_for(limit, jax.devices()[:1])
    steps = [step for step in steps if step.remat == "block" and not step.packed and step.seq_len <= 32_768]

    def repeated(group: int):
        """grouped_attention, which has as many kv heads as query heads."""
        inner = grouped_attention(group)

        def attention(module, query, key, value, mask, **options):
            rep = query.shape[1] // key.shape[1]
            key, value = (x.repeat_interleave(rep, 1) if rep > 1 else x for x in (key, value))
            return inner(module, query, key, value, mask, **options)

        return attention

    def build(step: Step):
        AttentionInterface.register("grouped", repeated(step.seq_len // 4))
        fields = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")
        fields += ("intermediate_size", "vocab_size", "tie_word_embeddings")
        sizes = {field: getattr(MODELS[step.model], field) for field in fields}
        how = "grouped" if step.attention == "s2" else "sdpa"
        config = LlamaConfig(**sizes, max_position_embeddings=step.seq_len, use_cache=False, attn_implementation=how)
        torch.set_default_dtype(dtype)
        try:
            with torch.device(device):
                model = LlamaForCausalLM(config)
        finally:
            torch.set_default_dtype(torch.float32)
        targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
        model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=targets, task_type="CAUSAL_LM"))
        for key, weight in model.named_parameters():
            if "embed" in key or "norm" in key:
                weight.requires_grad_(True)
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        return model.train()

    def measure(step: Step, backend: str):
        gc.collect()
        if cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        model = build(step)
        trained = [weight for weight in model.parameters() if weight.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=2e-5, betas=(0.9, 0.95), weight_decay=0.0)
        tokens = torch.randint(0, MODELS[step.model].vocab_size, (1, step.seq_len), device=device)
        seconds, losses = [], []
        with sdpa_kernel(getattr(SDPBackend, backend)):
            for _ in range(2 if part.tiny else 4):
                began = time.perf_counter()
                loss = model(input_ids=tokens, labels=tokens).loss
                loss.backward()
                torch.nn.utils.clip_grad_norm_(trained, 1.0)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                losses.append(loss.item())  # waits for the device
                seconds.append(time.perf_counter() - began)
        s = statistics.median(seconds[1:])
        found = {"trained": sum(weight.numel() for weight in trained), "first_seconds": seconds[0], "seconds": s}
        found |= {"tokens_per_second": step.seq_len / s, "losses": losses}
        return found | ({"peak_gib": torch.cuda.max_memory_allocated() / 2**30} if cuda else {})

    for step in steps:
        for backend in ("CUDNN_ATTENTION", "FLASH_ATTENTION") if cuda else ("FLASH_ATTENTION",):
            given = {"library": "transformers + PEFT", "model": step.model, "seq_len": step.seq_len}
            given |= {"attention": step.attention, "backend": backend}
            part.run(given, functools.partial(measure, step, backend))
    part.save()


if __name__ == "__main__":
    main()
