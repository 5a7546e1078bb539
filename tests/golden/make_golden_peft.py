"""Makes tests/golden/tiny_llama_{lora,dora}: adapters of `peft` on tiny_llama. Run by hand.

  pip install torch transformers peft
  python tests/golden/make_golden_peft.py

Each folder also has the logits, in float64, of the adapted model (logits.npz). Nothing
here uses our code.
"""

import json
import pathlib

import numpy as np
import peft
import torch
import transformers

HERE = pathlib.Path(__file__).parent
SETTINGS = {
  'lora': dict(r=3, lora_alpha=7, target_modules=['q_proj', 'v_proj', 'o_proj']),
  'dora': dict(
    r=4, lora_alpha=6, use_rslora=True, use_dora=True,
    target_modules=['k_proj', 'o_proj', 'gate_proj', 'up_proj', 'down_proj'],
  ),
}  # fmt: skip


def main():
  tokens = np.random.default_rng(0).integers(0, 97, (2, 11))
  for name, settings in SETTINGS.items():
    torch.manual_seed(0)
    base = transformers.AutoModelForCausalLM.from_pretrained(
      HERE / 'tiny_llama', dtype=torch.float32, attn_implementation='eager'
    )
    config = peft.LoraConfig(task_type='CAUSAL_LM', **settings)
    model = peft.get_peft_model(base, config)
    with torch.no_grad():
      for leaf, x in model.named_parameters():
        if 'lora_magnitude' in leaf:
          x.mul_(1 + 0.2 * torch.randn_like(x))
        elif 'lora_' in leaf:
          x.normal_(0, 0.2)
    folder = HERE / f'tiny_llama_{name}'
    model.save_pretrained(folder)
    (folder / 'README.md').unlink(missing_ok=True)
    file = folder / 'adapter_config.json'
    said = json.loads(file.read_text()) | {'base_model_name_or_path': '../tiny_llama'}
    file.write_text(json.dumps(said, indent=2, sort_keys=True) + '\n')
    with torch.no_grad():
      logits = model.double()(torch.tensor(tokens)).logits.numpy()
    np.savez_compressed(folder / 'logits.npz', tokens=tokens, logits=logits)


if __name__ == '__main__':
  main()
