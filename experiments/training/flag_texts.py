"""What the flags mean that several commands share, by group. Imports no torch."""

from __future__ import annotations

GROUPS = ("data", "network", "memory", "optimiser", "schedule", "output")

COMMON = {
    "data": {
        "dataset": "images to learn; digits ship inside scikit-learn",
        "data": "folder that holds the data set, or into which it is downloaded",
        "train_subset_size": "learn from so many images, the first of the published order "
        "(default all)",
        "test_subset_size": "test on so many images, likewise (default all)",
        "held_out": "training images that are held out, the same ones for every seed; epochs and "
        "settings can be chosen by them",
        "data_augment": "move images by whole pixels, and mirror them where that is the same class",
        "augment_shift": "pixels that --data-augment moves an image at most (default 1 of digits, "
        "2 of Fashion-MNIST, 4 of CIFAR-10)",
        "flips": "mirror images (default as suits the data)",
        "shift": "pixels that an image is moved at most",
        "cutout": "side in pixels of a square that is blotted out of every image; 0 none",
        "batch_size": "samples of a step; with rows, each appends as many",
        "test_batch_size": "samples of a forward pass while testing; changes no result",
        "seed": "of the initial network and of the order of samples",
    },
    "network": {
        "width": "units of a finite network; 0 the infinite one",
        "gaussian_init": "with --width: the finite μ-network, not the π-network",
        "r": "rank, the numbers that a layer hands on; also its rows to begin with",
        "depth": "hidden π-layers between input layer and readout (InfMLP's L)",
        "activation": "activation of hidden units; others than relu need --memory moments",
        "layernorm": "layer norm of pre-activations",
        "first_layer_alpha": "multiplier of the first layer's output",
        "last_layer_alpha": "multiplier of the readout's output",
        "bias_alpha": "multiplier of biases; 0 no biases",
        "last_bias_alpha": "multiplier of the readout's bias (default that of --bias-alpha)",
        "loss": "cross entropy, or squared error to one-hot labels",
    },
    "memory": {
        "memory": "rows, which grow with every step, or moments, which are all rows as one matrix "
        "of fixed size",
        "degree": "of the polynomial kernel of moments",
        "fit": "how that polynomial is chosen: see pilimit_lib.inf's README",
        "row_budget": "the newest rows that are kept exact; older ones become moments "
        "(default all)",
        "merge": "cosine above which rows of one sample are merged into one, such as 0.95 "
        "(default never)",
        "float": "rows in float32 on a GPU too, where float16 is the default",
        "implementation": "sums in torch, or in C++ where a compiler is found; auto chooses, and a "
        "resumed run keeps what it had",
    },
    "optimiser": {
        "optimizer": "SGD is the one whose limit is known; the others need --memory moments or a "
        "finite network",
        "lr": "learning rate",
        "momentum": "of SGD",
        "wd": "weight decay per step",
        "first_layer_lr_mult": "the first layer's share of --lr",
        "last_layer_lr_mult": "the readout's share of --lr",
        "bias_lr_mult": "the biases' share of --lr",
        "no_apply_lr_mult_to_wd": "the same decay in all layers, whatever their share of --lr",
        "gclip": "bound on the gradient's norm; 0 none",
        "gclip_per_param": "clip every parameter by itself, not all together",
        "label_smoothing": "share of the label that is spread over all classes",
        "ema": "decay of the running average of the weights, which is tested; 0 none",
        "average_from": "also test the mean of the networks at the ends of this epoch and later "
        "ones",
        "accum_steps": "batches whose gradients are summed before a step",
        "teacher_path": "state_dict of an infinite network to learn from beside the labels",
        "teacher_alpha": "weight of the teacher's outputs in the loss",
        "teacher_temp": "temperature at which the teacher's outputs are read",
    },
    "schedule": {
        "epochs": "passes over the training data",
        "scheduler": "how the learning rate falls; multistep at --lr-drop-milestones",
        "lr_drop_ratio": "factor of the learning rate at a milestone",
        "lr_drop_milestones": "epochs at which it falls, such as 40 or 30,45",
        "gclip_drop_ratio": "factor of the clip at a milestone",
        "gclip_drop_milestones": "epochs at which the clip falls, such as 40",
    },
    "output": {
        "cuda": "run on the GPU; an error where there is none",
    },
}
