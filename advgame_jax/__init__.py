"""AdvGame in JAX: an Attacker and a Defender language model trained jointly from pairwise preferences."""
