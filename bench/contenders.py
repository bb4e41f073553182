"""What is measured: training and sampling of one network by each library, in the way in which that
library does it."""
import sys
from contextlib import nullcontext

import torch

HALF = dict(mult=(1, 2, 2, 2), attention=(16, 8), heads=4)
SIZES = {  # network, images a batch, steps a measurement
    "tiny": dict(channels=32, blocks=2, size=32, batch=2, **HALF),
    "cpu": dict(channels=64, blocks=2, size=32, batch=16, **HALF),
    "cifar10": dict(channels=128, blocks=3, size=32, batch=128, **HALF),
    "imagenet64": dict(channels=128, blocks=3, size=64, batch=64, **HALF | {"mult": (1, 2, 3, 4)})}


def images(c, device, n=512):
    return torch.randint(0, 256, (n, 3, c["size"], c["size"]), dtype=torch.uint8,
                         generator=torch.Generator().manual_seed(0)).to(device)


def our_network(c):
    from iddpm_nb.unet import UNet
    return UNet(3, 6, c["channels"], c["mult"], c["blocks"], c["attention"], c["size"], c["heads"])


class Plain(torch.nn.Module):
    "A network of diffusers that answers with a tensor."
    def __init__(self, net):
        super().__init__()
        self.net = net
    def forward(self, x, t): return self.net(x, t).sample


def work(net, c):
    "GFLOP for an image: forward; forward and backward."
    from iddpm_nb.training.speed import flops
    return [f / 1e9 for f in flops(Plain(net) if hasattr(net, "config") else net,
                                   (3, c["size"], c["size"]))]


class Ours:
    """Ours at its defaults: `train` with the hybrid loss, batches gathered from uint8 images on the
    device, fused AdamW, one EMA updated in each step, gradient norm logged; precision, layout and
    compiling as `training.speed` decides. Sampling: `sample`, learned variance."""
    def __init__(self, c, device, precision="auto", compile="auto"):
        from iddpm_nb.schedule import make_schedule
        from iddpm_nb.training.speed import fast_network, pick_precision
        self.c, self.device, self.compile = c, device, compile
        self.precision = pick_precision(precision, device, c["size"])
        self.net = our_network(c).to(device)
        self.s = make_schedule("cosine", 1000).to(device)
        self.ask = fast_network(self.net, device, compile)

    def training(self):
        from iddpm_nb.data import Batches, Images
        from iddpm_nb.importance import UniformSampler
        from iddpm_nb.train import start_training, train
        run = start_training(self.net, Batches(Images(images(self.c, self.device)), self.c["batch"],
                                               0, self.device), UniformSampler(1000))
        run.ask = self.ask
        steps = train(run, self.s, 10**9, precision=self.precision)
        return lambda: next(steps)

    def sampling(self, n):
        from iddpm_nb.sampling import sample
        from iddpm_nb.training.speed import InPrecision, cast_once, fast_network
        fast = fast_network(cast_once(self.net.eval(), self.precision), self.device, self.compile)
        net = InPrecision(fast, self.precision)        # as `Model.quick` does
        return lambda: sample(net, self.s, (self.c["batch"], 3, self.c["size"], self.c["size"]), n,
                              progress=False)


class Diffusers:
    """diffusers: UNet2DModel with the same widths, blocks, attention and heads, trained as its
    example examples/unconditional_image_generation/train_unconditional.py does with --use_ema: loss
    of the noise (here of the first 3 of 6 output channels), gradient clipping at 1, AdamW (0.95,
    0.999), EMAModel each step, the loss read in each step. Sampling: DDPMScheduler with
    learned_range, as DDPMPipeline does."""
    def __init__(self, c, device, precision="float32", compile="off"):
        from diffusers import DDPMScheduler, UNet2DModel
        widths = tuple(c["channels"] * m for m in c["mult"])
        at = [c["size"] // 2**i in c["attention"] for i in range(len(widths))]
        self.c, self.device, self.precision = c, device, precision
        self.net = UNet2DModel(
            sample_size=c["size"], in_channels=3, out_channels=6,
            block_out_channels=widths, layers_per_block=c["blocks"],
            down_block_types=tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in at),
            up_block_types=tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in at[::-1]),
            attention_head_dim=widths[-1] // c["heads"], resnet_time_scale_shift="scale_shift",
            flip_sin_to_cos=True, freq_shift=0).to(device)
        self.noise = DDPMScheduler(num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2",
                                   variance_type="learned_range")
        if compile == "on": self.net.compile()

    def context(self):
        return (torch.autocast(torch.device(self.device).type, torch.bfloat16)
                if self.precision == "bfloat16" else nullcontext())

    def training(self):
        import torch.nn.functional as F
        from diffusers.optimization import get_scheduler
        from diffusers.training_utils import EMAModel
        opt = torch.optim.AdamW(self.net.parameters(), lr=1e-4, betas=(0.95, 0.999),
                                weight_decay=1e-6, eps=1e-8)
        ema = EMAModel(self.net.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0,
                       power=0.75)
        plan = get_scheduler("cosine", optimizer=opt, num_warmup_steps=500,
                             num_training_steps=10**6)
        x = images(self.c, self.device).float() / 127.5 - 1
        B = self.c["batch"]

        def step():
            clean = x[torch.randint(len(x), (B,), device=self.device)]
            noise, t = torch.randn_like(clean), torch.randint(0, 1000, (B,), device=self.device)
            noisy = self.noise.add_noise(clean, noise, t)
            with self.context():
                out = self.net(noisy, t).sample
            loss = F.mse_loss(out[:, :3].float(), noise)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
            opt.step()
            plan.step()
            opt.zero_grad()
            ema.step(self.net.parameters())
            return loss.detach().item()
        return step

    def sampling(self, n):
        self.net.eval()

        @torch.no_grad()
        def draw():
            x = torch.randn(self.c["batch"], 3, self.c["size"], self.c["size"], device=self.device)
            self.noise.set_timesteps(n, device=self.device)
            for t in self.noise.timesteps:
                with self.context():
                    out = self.net(x, t).sample
                x = self.noise.step(out.float(), t, x).prev_sample
            return (x / 2 + 0.5).clamp(0, 1)
        return draw


class DenoisingDiffusion:
    """denoising-diffusion-pytorch: Unet(learned_variance=True) in LearnedGaussianDiffusion, trained
    as its Trainer does: the hybrid loss, gradient clipping at 1, Adam (0.9, 0.99), EMA every 10
    steps, the loss read in each step. It always has 2 blocks a level on both ways, attention once a
    level (linear where full attention is not asked for) and a 7x7 first convolution, so at our
    width it has less to do. Its width is the multiple of 8 with which a training image costs as
    many operations as ours, as nearly as possible; or ours ("same width"). Sampling: p_sample_loop
    of a chain of as many steps as are asked for (its shortened sampler does not work with learned
    variance)."""
    def __init__(self, c, device, precision="float32", compile="off", same_width=False):
        from denoising_diffusion_pytorch import LearnedGaussianDiffusion
        if same_width and c["blocks"] != 2:
            raise NotImplementedError("its Unet has 2 blocks a level")
        self.c, self.device, self.precision = c, device, precision
        self.net = self.unet(c["channels"] if same_width else self.fair_width()).to(device)
        self.chain = lambda T: LearnedGaussianDiffusion(self.net, image_size=c["size"], timesteps=T,
                                                        beta_schedule="cosine").to(device)
        if compile == "on": self.net.compile()

    context = Diffusers.context

    def unet(self, width):
        from denoising_diffusion_pytorch import Unet
        c = self.c
        full = tuple(c["size"] // 2**i in c["attention"] for i in range(len(c["mult"])))
        return Unet(width, dim_mults=c["mult"], learned_variance=True, full_attn=full,
                    attn_heads=c["heads"], attn_dim_head=width * c["mult"][-1] // c["heads"],
                    flash_attn=torch.device(self.device).type == "cuda")

    def fair_width(self):
        with torch.device("meta"):
            aim = work(our_network(self.c), self.c)[1]
            widths = range(self.c["channels"], 3 * self.c["channels"] // 2, 8)
            return min(widths, key=lambda w: abs(work(self.unet(w), self.c)[1] - aim))

    def training(self):
        from ema_pytorch import EMA
        diffusion = self.chain(1000)
        opt = torch.optim.Adam(diffusion.parameters(), lr=1e-4, betas=(0.9, 0.99))
        ema = EMA(diffusion, beta=0.995, update_every=10).to(self.device)
        x = images(self.c, self.device).float() / 255

        def step():
            data = x[torch.randint(len(x), (self.c["batch"],), device=self.device)]
            with self.context():
                loss = diffusion(data)
            total = loss.item()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(diffusion.parameters(), 1.0)
            opt.step()
            opt.zero_grad()
            ema.update()
            return total
        return step

    def sampling(self, n):
        diffusion = self.chain(n).eval()

        def draw():
            with self.context():
                return diffusion.sample(batch_size=self.c["batch"])
        return draw


CONTENDERS = {  # name in the table -> how it is made, from the settings that ours chose
    "ours": lambda c, device, same: Ours(c, device),
    "ours, float32, not compiled": lambda c, device, same: Ours(c, device, "float32", "off"),
    "diffusers": lambda c, device, same: Diffusers(c, device),
    "denoising-diffusion-pytorch": lambda c, device, same: DenoisingDiffusion(c, device),
    "denoising-diffusion-pytorch, same width":
        lambda c, device, same: DenoisingDiffusion(c, device, same_width=True),
    "diffusers, our settings": lambda c, device, same: Diffusers(c, device, *same),
    "denoising-diffusion-pytorch, our settings":
        lambda c, device, same: DenoisingDiffusion(c, device, *same)}


def make(name, c, device):
    "A contender; 'our settings' are the precision and compiling that ours chooses here."
    from iddpm_nb.training.speed import pick_precision
    same = (pick_precision("auto", device, c["size"]),
            "on" if torch.device(device).type == "cuda" else "off")
    torch.manual_seed(0)
    return CONTENDERS[name](c, device, same)
