"""Train and test a detector with Detectron2 from exported weights.

python launch/transfer/detectron2/train.py --num-gpus 8 \
    --config-file launch/transfer/detectron2/coco_fpn_1x.yaml MODEL.WEIGHTS backbone.pkl
Detectron2's own command-line options hold; the data lie where its variable DETECTRON2_DATASETS says.
"""

import os

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.engine import DefaultTrainer, default_argument_parser, default_setup, launch
from detectron2.evaluation import COCOEvaluator, PascalVOCDetectionEvaluator
from detectron2.layers import get_norm
from detectron2.modeling.roi_heads import ROI_HEADS_REGISTRY, Res5ROIHeads


@ROI_HEADS_REGISTRY.register()
class Res5ROIHeadsWithNorm(Res5ROIHeads):
    """res5 for each region and a norm behind it, which pre-trained networks of unlike scale need here."""

    @classmethod
    def _build_res5_block(cls, cfg):
        block, channels = super()._build_res5_block(cfg)
        block.add_module("norm", get_norm(cfg.MODEL.RESNETS.NORM, channels))
        return block, channels


class Trainer(DefaultTrainer):
    """Detectron2's trainer with the evaluation that belongs to each data set."""

    @classmethod
    def build_evaluator(cls, cfg, dataset_name):
        """VOC's average precision or COCO's."""
        if dataset_name.startswith("voc"):
            return PascalVOCDetectionEvaluator(dataset_name)
        return COCOEvaluator(dataset_name, output_dir=os.path.join(cfg.OUTPUT_DIR, "inference"))


def main(args):
    """One process of a training or, with --eval-only, of a test."""
    cfg = get_cfg()
    cfg.merge_from_file(args.config_file)
    cfg.merge_from_list(args.opts)
    cfg.freeze()
    default_setup(cfg, args)
    if args.eval_only:  # --resume: the last checkpoint in OUTPUT_DIR, else MODEL.WEIGHTS
        model = Trainer.build_model(cfg)
        DetectionCheckpointer(model, cfg.OUTPUT_DIR).resume_or_load(cfg.MODEL.WEIGHTS, resume=args.resume)
        return Trainer.test(cfg, model)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    return trainer.train()


if __name__ == "__main__":
    options = default_argument_parser().parse_args()
    launch(
        main, options.num_gpus, num_machines=options.num_machines, machine_rank=options.machine_rank,
        dist_url=options.dist_url, args=(options,),
    )  # fmt: skip
