"""Models as other fields write them: geometry, physics, densities, structured prediction, metric learning."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from zoo.entry import Entry, dense, entry, images, integers, normal, tokens

CLASSES = 8


class SplineLayer(nn.Module):
    """A layer of a Kolmogorov-Arnold network: a B-spline on every edge, evaluated by Cox and de Boor."""

    def __init__(self, inputs: int, outputs: int, intervals: int = 5, order: int = 3) -> None:
        super().__init__()
        self.order = order
        knots = torch.arange(-order, intervals + order + 1) * 2 / intervals - 1
        self.register_buffer("grid", knots.expand(inputs, -1).contiguous())
        self.base = nn.Parameter(torch.randn(outputs, inputs) * 0.3)
        self.spline = nn.Parameter(torch.randn(outputs, inputs, intervals + order) * 0.1)
        self.scale = nn.Parameter(torch.ones(outputs, inputs))

    def forward(self, x: Tensor) -> Tensor:
        at, grid = x.unsqueeze(-1), self.grid
        bases = ((at >= grid[:, :-1]) & (at < grid[:, 1:])).to(x.dtype)
        for k in range(1, self.order + 1):
            left = (at - grid[:, : -(k + 1)]) / (grid[:, k:-1] - grid[:, : -(k + 1)])
            right = (grid[:, k + 1 :] - at) / (grid[:, k + 1 :] - grid[:, 1:-k])
            bases = left * bases[:, :, :-1] + right * bases[:, :, 1:]
        weight = self.spline * self.scale.unsqueeze(-1)
        splines = F.linear(bases.view(x.size(0), -1), weight.view(weight.size(0), -1))
        return F.linear(F.silu(x), self.base) + splines


def kolmogorov_arnold() -> nn.Module:
    """Return a Kolmogorov-Arnold network of three layers."""
    return nn.Sequential(SplineLayer(4, 16), SplineLayer(16, 16), SplineLayer(16, CLASSES))


class SpectralConv(nn.Module):
    """A product with the lowest frequencies of the channels."""

    def __init__(self, channels: int, modes: int) -> None:
        super().__init__()
        self.modes = modes
        self.weight = nn.Parameter(torch.randn(channels, channels, modes, 2) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        spectrum = torch.fft.rfft(x)
        kept = torch.zeros_like(spectrum)
        weight = torch.view_as_complex(self.weight)
        kept[:, :, : self.modes] = torch.einsum("bix,iox->box", spectrum[:, :, : self.modes], weight)
        return torch.fft.irfft(kept, n=x.size(-1))


class FourierOperator(nn.Module):
    """A Fourier neural operator on a line, which is told the place beside the value."""

    def __init__(self) -> None:
        super().__init__()
        self.lift = nn.Linear(2, 16)
        self.spectral = nn.ModuleList(SpectralConv(16, 4) for _ in range(2))
        self.local = nn.ModuleList(nn.Conv1d(16, 16, 1) for _ in range(2))
        self.project = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 1))

    def forward(self, x: Tensor) -> Tensor:
        place = torch.linspace(0, 1, x.size(1)).reshape(1, -1, 1).repeat(x.size(0), 1, 1)
        x = self.lift(torch.cat([x, place], -1)).permute(0, 2, 1)
        for spectral, local in zip(self.spectral, self.local, strict=True):
            x = F.gelu(spectral(x) + local(x))
        return self.project(x.permute(0, 2, 1))


class RadianceField(nn.Module):
    """A radiance field with Fourier features, a skip of the input, and the sum along each ray."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(27, 32)
        self.second = nn.Linear(27 + 32, 32)
        self.density = nn.Linear(32, 1)
        self.features = nn.Linear(32, 32)
        self.view = nn.Linear(32 + 15, 16)
        self.colour = nn.Linear(16, 3)

    def encode(self, x: Tensor, octaves: int) -> Tensor:
        waves = [wave(x * 2.0**i) for i in range(octaves) for wave in (torch.sin, torch.cos)]
        return torch.cat([x, *waves], -1)

    def forward(self, points: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
        encoded = self.encode(points, 4)
        x = F.relu(self.second(torch.cat([encoded, F.relu(self.first(encoded))], -1)))
        density = F.relu(self.density(x)).squeeze(-1)
        seen = torch.cat([self.features(x), self.encode(directions, 2)], -1)
        colour = torch.sigmoid(self.colour(F.relu(self.view(seen))))
        opacity = 1 - torch.exp(-0.1 * density)
        clear = torch.cumprod(torch.cat([torch.ones_like(opacity[:, :1]), 1 - opacity + 1e-10], -1), -1)
        return ((opacity * clear[:, :-1])[..., None] * colour).sum(-2), density


class MixtureDensity(nn.Module):
    """A mixture density network that returns its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh())
        self.weights = nn.Linear(32, 5)
        self.means = nn.Linear(32, 10)
        self.deviations = nn.Linear(32, 10)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x = self.body(x)
        means = self.means(x).view(-1, 5, 2)
        deviations = F.softplus(self.deviations(x)).view(-1, 5, 2) + 1e-3
        each = torch.distributions.Normal(means, deviations).log_prob(y.unsqueeze(1))
        return -torch.logsumexp(F.log_softmax(self.weights(x), -1) + each.sum(-1), -1).mean()


class HyperNetwork(nn.Module):
    """A network whose weights are computed from a task's code."""

    def __init__(self) -> None:
        super().__init__()
        self.code = nn.Linear(6, 32)
        self.first = nn.Linear(32, 16 * 8)
        self.bias = nn.Linear(32, 16)
        self.second = nn.Linear(32, 4 * 16)

    def forward(self, x: Tensor, task: Tensor) -> Tensor:
        code = torch.relu(self.code(task))
        hidden = torch.bmm(self.first(code).view(-1, 16, 8), x.unsqueeze(-1)).squeeze(-1)
        hidden = torch.relu(hidden + self.bias(code))
        return torch.bmm(self.second(code).view(-1, 4, 16), hidden.unsqueeze(-1)).squeeze(-1)


class CouplingFlow(nn.Module):
    """A normalizing flow of affine couplings, whose halves change places."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = nn.ModuleList(
            nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 8)) for _ in range(3)
        )

    def forward(self, x: Tensor) -> Tensor:
        volume = torch.zeros(x.size(0))
        for step in self.steps:
            kept, moved = x.chunk(2, 1)
            scale, shift = step(kept).chunk(2, 1)
            scale = torch.tanh(scale)
            x = torch.fliplr(torch.hstack([kept, moved * scale.exp() + shift]))
            volume = volume + scale.sum(1)
        return volume - 0.5 * (x**2).sum(1)


class PointerNetwork(nn.Module):
    """Attention over the inputs as the output; what was taken is fed back."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(2, 16)
        self.encoder = nn.GRU(16, 32, batch_first=True)
        self.decoder = nn.GRUCell(16, 32)
        self.keys = nn.Linear(32, 32, bias=False)
        self.query = nn.Linear(32, 32, bias=False)
        self.score = nn.Linear(32, 1, bias=False)
        self.start = nn.Parameter(torch.randn(16))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        states, final = self.encoder(x)
        hidden, given = final.squeeze(0), self.start.expand(x.size(0), -1)
        scores = []
        for _ in range(2):
            hidden = self.decoder(given, hidden)
            score = self.score(torch.tanh(self.keys(states) + self.query(hidden).unsqueeze(1))).squeeze(-1)
            scores.append(F.log_softmax(score, -1))
            given = torch.bmm(F.softmax(score, -1).unsqueeze(1), x).squeeze(1)
        return torch.stack(scores, 1)


class SelectiveScan(nn.Module):
    """A selective state space as a loop over time."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(100, 32)
        self.inputs = nn.Linear(32, 128, bias=False)
        self.conv = nn.Conv1d(64, 64, 3, groups=64, padding=2)
        self.select = nn.Linear(64, 4 + 8, bias=False)
        self.step = nn.Linear(4, 64)
        self.decay = nn.Parameter(torch.rand(64, 4))
        self.skip = nn.Parameter(torch.ones(64))
        self.outputs = nn.Linear(64, 32, bias=False)
        self.head = nn.Linear(32, 100)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        u, gate = self.inputs(x).chunk(2, -1)
        u = F.silu(self.conv(u.transpose(1, 2))[..., : ids.size(1)].transpose(1, 2))
        step, into, out = self.select(u).split([4, 4, 4], -1)
        step = F.softplus(self.step(step))[..., None]
        state = torch.zeros(u.size(0), 64, 4)
        seen = []
        for t in range(ids.size(1)):
            state = torch.exp(-step[:, t] * torch.exp(self.decay)) * state
            state = state + step[:, t] * into[:, t, None] * u[:, t, :, None]
            seen.append((state * out[:, t, None]).sum(-1) + self.skip * u[:, t])
        return self.head(x + self.outputs(torch.stack(seen, 1) * F.silu(gate)))


class VectorQuantizer(nn.Module):
    """An autoencoder with a code book, a straight-through gradient, and its losses."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, 16, 4, 2, 1), nn.ReLU(), nn.Conv2d(16, 16, 3, 1, 1))
        self.codes = nn.Embedding(32, 16)
        self.decoder = nn.Sequential(
            nn.Conv2d(16, 32, 3, 1, 1), nn.ReLU(), nn.ConvTranspose2d(32, 3, 4, 2, 1)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = self.encoder(x).permute(0, 2, 3, 1).contiguous()
        flat, codes = z.view(-1, 16), self.codes.weight
        distances = flat.pow(2).sum(1, keepdim=True) + codes.pow(2).sum(1) - 2 * flat @ codes.t()
        nearest = torch.argmin(distances, 1).unsqueeze(1)
        chosen = torch.zeros(nearest.shape[0], 32).scatter_(1, nearest, 1)
        q = torch.matmul(chosen, codes).view(z.shape)
        loss = F.mse_loss(q, z.detach()) + 0.25 * F.mse_loss(q.detach(), z)
        return self.decoder((z + (q - z).detach()).permute(0, 3, 1, 2).contiguous()), loss


class SlotAttention(nn.Module):
    """Slots that compete for the inputs, updated by a recurrent cell."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 32)
        self.norm = nn.LayerNorm(32)
        self.norm_slots = nn.LayerNorm(32)
        self.query = nn.Linear(32, 32)
        self.key = nn.Linear(32, 32)
        self.value = nn.Linear(32, 32)
        self.cell = nn.GRUCell(32, 32)
        self.slots = nn.Parameter(torch.randn(1, 4, 32))
        self.head = nn.Linear(32, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.embed(x))
        keys, values = self.key(x), self.value(x)
        slots = self.slots.expand(x.size(0), -1, -1)
        for _ in range(2):
            scores = torch.einsum("bid,bjd->bij", self.query(self.norm_slots(slots)), keys)
            weights = (scores / math.sqrt(32)).softmax(1) + 1e-8
            updates = torch.einsum("bjd,bij->bid", values, weights / weights.sum(-1, keepdim=True))
            slots = self.cell(updates.reshape(-1, 32), slots.reshape(-1, 32)).reshape(x.size(0), -1, 32)
        return self.head(slots)


class EdgeConvolution(nn.Module):
    """Convolutions over the edges to the nearest neighbours of each point."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(6, 16, 1, bias=False)
        self.second = nn.Conv2d(32, 32, 1, bias=False)
        self.head = nn.Linear(32, CLASSES)

    def edges(self, x: Tensor, count: int = 4) -> Tensor:
        batch, channels, points = x.shape
        squares = torch.sum(x**2, dim=1, keepdim=True)
        closeness = 2 * torch.matmul(x.transpose(2, 1), x) - squares - squares.transpose(2, 1)
        nearest = closeness.topk(k=count, dim=-1)[1] + torch.arange(batch).view(-1, 1, 1) * points
        x = x.transpose(2, 1).contiguous()
        others = x.view(batch * points, -1)[nearest.view(-1), :].view(batch, points, count, channels)
        x = x.view(batch, points, 1, channels).repeat(1, 1, count, 1)
        return torch.cat((others - x, x), dim=3).permute(0, 3, 1, 2).contiguous()

    def forward(self, x: Tensor) -> Tensor:
        x = F.leaky_relu(self.first(self.edges(x)), 0.2).max(dim=-1)[0]
        x = F.leaky_relu(self.second(self.edges(x)), 0.2).max(dim=-1)[0]
        return self.head(x.amax(-1))


class MessagePassing(nn.Module):
    """A graph network over a list of edges, with messages summed by index and a recurrent update."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 32)
        self.message = nn.Linear(64, 32)
        self.update = nn.GRUCell(32, 32)
        self.head = nn.Linear(32, CLASSES)

    def forward(self, x: Tensor, source: Tensor, target: Tensor) -> Tensor:
        x = torch.relu(self.embed(x))
        for _ in range(2):
            messages = torch.relu(self.message(torch.cat([x[source], x[target]], -1)))
            x = self.update(torch.zeros_like(x).index_add_(0, target, messages), x)
        return self.head(x.mean(0, keepdim=True))


class TripletEmbedding(nn.Module):
    """One tower for three images, compared by distance."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = nn.Sequential(
            nn.Conv2d(3, 16, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 16)
        )

    def forward(self, anchor: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
        a, p, n = (F.normalize(self.tower(x), dim=-1) for x in (anchor, positive, negative))
        return F.softplus(F.pairwise_distance(a, p) - F.pairwise_distance(a, n))


def discriminator() -> nn.Module:
    """Return the discriminator of a GAN with spectral norms."""
    return nn.Sequential(
        spectral_norm(nn.Conv2d(3, 16, 4, 2, 1)),
        nn.LeakyReLU(0.2, inplace=True),
        spectral_norm(nn.Conv2d(16, 32, 4, 2, 1)),
        nn.LeakyReLU(0.2, inplace=True),
        nn.Conv2d(32, 1, 4),
        nn.Flatten(0),
    )


FAMILY = "fields"

ENTRIES: tuple[Entry, ...] = (
    entry("kolmogorov_arnold", kolmogorov_arnold, dense(3, 4), FAMILY),
    entry("fourier_operator", FourierOperator, dense(2, 12, 1), FAMILY),
    entry("radiance_field", RadianceField, lambda: (normal(2, 6, 3), normal(2, 6, 3, seed=2)), FAMILY),
    entry("mixture_density", MixtureDensity, lambda: (normal(3, 8), normal(3, 2, seed=2)), FAMILY),
    entry("hyper_network", HyperNetwork, lambda: (normal(3, 8), normal(3, 6, seed=2)), FAMILY),
    entry("coupling_flow", CouplingFlow, dense(3, 8), FAMILY),
    entry("pointer_network", PointerNetwork, dense(2, 5, 2), FAMILY),
    entry("selective_scan", SelectiveScan, tokens(4), FAMILY),
    entry("vector_quantizer", VectorQuantizer, images(16), FAMILY),
    entry("slot_attention", SlotAttention, dense(2, 5, 8), FAMILY),
    entry("edge_convolution", EdgeConvolution, dense(2, 3, 10), FAMILY),
    entry(
        "message_passing",
        MessagePassing,
        lambda: (normal(6, 8), integers(7, low=0, high=6), integers(7, low=0, high=6, seed=2)),
        FAMILY,
    ),
    entry(
        "triplet_embedding",
        TripletEmbedding,
        lambda: tuple(normal(2, 3, 8, 8, seed=i) for i in range(3)),
        FAMILY,
    ),
    entry("discriminator", discriminator, images(16), FAMILY),
)
