"""Keras on its PyTorch backend: `fit` and `evaluate` with the PyTorch module as a layer."""

from __future__ import annotations

import os

os.environ["KERAS_BACKEND"] = "torch"

import keras

from _common import NUM_CLASSES, Job


def make_model(job: Job) -> keras.Model:
    shape = tuple(job.dataset.tensors[0].shape[1:])
    layers = [keras.Input(shape), keras.layers.TorchModuleWrapper(job.model, output_shape=(None, NUM_CLASSES))]
    model = keras.Sequential(layers)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer=keras.optimizers.SGD(0.01), loss=loss)
    return model


def train(job: Job) -> None:
    make_model(job).fit(job.loader(), epochs=job.num_epochs, verbose=0 if job.is_quiet else 1)


def evaluate(job: Job) -> None:
    make_model(job).evaluate(job.eval_loader(), verbose=0 if job.is_quiet else 1)
