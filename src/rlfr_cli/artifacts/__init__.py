"""What lies on disk: shards and manifests, rollouts, latents, flow files, scores and run folders."""
