import unittest, unittest.mock

import hf_upstream
from torch import nn

from vitreg_hub.hf_models import VitRegBackbone, VitRegConfig, VitRegForImageClassification, VitRegModel

common, backbone, configuration, image_processing = hf_upstream.load(
    "test_modeling_common", "test_backbone_common", "test_configuration_common", "test_image_processing_common"
)

class Tester:
    batch_size=13
    image_size=20
    patch_size=4
    num_channels=3
    is_training=True
    hidden_size=32
    num_hidden_layers=2
    num_attention_heads=4
    seq_length=1+4+25
    def __init__(self, parent, arch="vit_nano_reg4"): self.parent=parent; self.arch=arch
    def get_config(self):
        return VitRegConfig(arch=self.arch, image_size=self.image_size, patch_size=self.patch_size, hidden_size=self.hidden_size, num_hidden_layers=self.num_hidden_layers, num_attention_heads=self.num_attention_heads)
    def prepare_config_and_inputs_for_common(self):
        return self.get_config(), {"pixel_values": common.floats_tensor([self.batch_size, self.num_channels, self.image_size, self.image_size])}

class VitRegModelTest(common.ModelTesterMixin, unittest.TestCase):
    all_model_classes=(VitRegModel, VitRegForImageClassification, VitRegBackbone)
    test_resize_embeddings=False
    test_can_init_all_missing_weights_before_2023 = True
    def setUp(self):
        self.model_tester=Tester(self)
        for n,c in (("MODEL_MAPPING_NAMES","VitRegModel"),("MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES","VitRegForImageClassification"),("MODEL_FOR_BACKBONE_MAPPING_NAMES","VitRegBackbone")):
            p=unittest.mock.patch.dict(getattr(common,n), {"timm_wrapper": c}); p.start(); self.addCleanup(p.stop)
        self.config_tester=configuration.ConfigTester(self, config_class=VitRegConfig, has_text_modality=False, model_args=VitRegConfig(hidden_size=37).model_args)
    def test_config(self): self.config_tester.run_common_tests()
    def test_model_get_set_embeddings(self):
        config,_=self.model_tester.prepare_config_and_inputs_for_common()
        for c in self.all_model_classes:
            m=c(config); self.assertIsInstance(m.get_input_embeddings(), nn.Module); x=m.get_output_embeddings(); self.assertTrue(x is None or isinstance(x, nn.Linear))
class VitRegBackboneTest(unittest.TestCase, backbone.BackboneTesterMixin):
    all_model_classes=(VitRegBackbone,)
    config_class=VitRegConfig
    def setUp(self): self.model_tester=Tester(self)
