"""The engine that draft and target share: models, paged KV cache, sampling, acceptance, drafters. No wire, no Redis."""
