"""Arithmetic that several methods share: contrastive losses, queues, teachers, prototypes, multi-crop, patches."""
