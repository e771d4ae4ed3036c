"""Arithmetic that several methods share: contrastive losses, queues, teachers, multi-crop."""
