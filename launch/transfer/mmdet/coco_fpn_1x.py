"""Mask R-CNN, ResNet-50 FPN, COCO 2017, 90,000 iterations of 16 images (1x), for mmdet 3.

mim train mmdet launch/transfer/mmdet/coco_fpn_1x.py --gpus 8 --launcher pytorch \
    --cfg-options model.backbone.init_cfg.checkpoint=backbone.pth
Every batch norm is synchronised and trained, no stage is frozen, the box head has four convolutions and one
linear layer.
"""

_base_ = "mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py"

norm = dict(type="SyncBN", requires_grad=True)
model = dict(
    data_preprocessor=dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], bgr_to_rgb=True),
    backbone=dict(
        frozen_stages=-1, norm_cfg=norm, norm_eval=False, style="pytorch",
        init_cfg=dict(type="Pretrained", checkpoint="backbone.pth"),
    ),
    neck=dict(norm_cfg=norm),
    roi_head=dict(
        bbox_head=dict(type="Shared4Conv1FCBBoxHead", conv_out_channels=256, norm_cfg=norm),
        mask_head=dict(norm_cfg=norm),
    ),
)  # fmt: skip

train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
    dict(type="RandomChoiceResize", scales=[(1333, s) for s in range(640, 801, 32)], keep_ratio=True),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PackDetInputs"),
]
train_dataloader = dict(  # images of one of 8 GPUs
    batch_size=2, sampler=dict(type="InfiniteSampler"), dataset=dict(pipeline=train_pipeline)
)
train_cfg = dict(_delete_=True, type="IterBasedTrainLoop", max_iters=90000, val_interval=30000)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.001, by_epoch=False, begin=0, end=1000),
    dict(type="MultiStepLR", by_epoch=False, begin=0, end=90000, milestones=[60000, 80000], gamma=0.1),
]
optim_wrapper = dict(optimizer=dict(type="SGD", lr=0.02, momentum=0.9, weight_decay=0.0001))
default_hooks = dict(checkpoint=dict(by_epoch=False, interval=10000))
log_processor = dict(by_epoch=False)
