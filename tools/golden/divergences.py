"""The distillation loss in plain torch, written from its definition; gradients are autograd's."""
import torch

OBJECTIVES = ["forward_kl", "reverse_kl", "adaptive_kl", "skewed_forward_kl", "skewed_reverse_kl", "js_divergence"]


def outcomes(s, t, spec):
    """Log-probabilities [C, outcomes] of student and teacher from tempered logits over the real vocabulary [C, V].

    Whole vocabulary; or its part S, the teacher's k largest entries, renormalised; or S and one bucket for the rest.
    """
    log_p, log_q = s.log_softmax(-1), t.log_softmax(-1)
    k = spec["topk"]
    if k == 0 or k >= t.shape[-1]:
        return log_p, log_q
    order = t.argsort(dim=-1, descending=True, stable=True)  # ties to the lower id
    top, rest = order[:, :k], order[:, k:]
    if spec["topk_mode"] == "renormalize":
        return s.gather(-1, top).log_softmax(-1), t.gather(-1, top).log_softmax(-1)

    def with_bucket(logits, log_prob):
        bucket = logits.gather(-1, rest).logsumexp(-1, keepdim=True) - logits.logsumexp(-1, keepdim=True)
        return torch.cat([log_prob.gather(-1, top), bucket], -1)

    return with_bucket(s, log_p), with_bucket(t, log_q)


def kl(log_a, log_b):
    return (log_a.exp() * (log_a - log_b)).sum(-1)


def adaptive_weights(log_p, log_q, alpha):
    """(w_head, w_tail, distance of the running sum from alpha) per position; constants for the gradient."""
    p, q = log_p.detach().exp(), log_q.detach().exp()
    ascending = q.sort(-1).values
    running = ascending.cumsum(-1)
    distance = (running - alpha).abs().min(-1).values
    over = running > alpha
    first = torch.where(over.any(-1), over.to(torch.int8).argmax(-1), q.shape[-1] - 1)
    threshold = ascending.gather(-1, first[:, None])
    gap = (q - p).abs()
    head = torch.where(q >= threshold, gap, 0).sum(-1)
    tail = torch.where(q < threshold, gap, 0).sum(-1)
    equal = head + tail < 1e-12
    total = torch.where(equal, 1, head + tail)
    return torch.where(equal, 0.5, head / total), torch.where(equal, 0.5, tail / total), distance


def divergence(log_p, log_q, spec):
    """D [C] per position, p the student and q the teacher."""
    name, lam = spec["objective"], spec["skew_lambda"]
    p, q = log_p.exp(), log_q.exp()
    if name == "forward_kl":
        return kl(log_q, log_p)
    if name == "reverse_kl":
        return kl(log_p, log_q)
    if name == "adaptive_kl":
        w_head, w_tail, _ = adaptive_weights(log_p, log_q, spec["adaptive_alpha"])
        return w_head * kl(log_q, log_p) + w_tail * kl(log_p, log_q)
    if name == "skewed_forward_kl":
        return kl(log_q, (lam * q + (1 - lam) * p).log())
    if name == "skewed_reverse_kl":
        return kl(log_p, ((1 - lam) * q + lam * p).log())
    if name == "js_divergence":
        m = ((p + q) / 2).log()
        return kl(log_q, m) / 2 + kl(log_p, m) / 2
    raise ValueError(name)


def loss_terms(student, teacher, labels, spec):
    """Per position [C]: cross-entropy, divergence, entropies of both tempered sides over the whole real vocabulary.

    student, teacher: logits [C, V] of the real vocabulary; labels [C].
    """
    s = student / spec["temperature"]
    t = teacher / (spec["temperature"] * spec["teacher_temperature"])
    entropy = lambda x: -(x.softmax(-1) * x.log_softmax(-1)).sum(-1)
    return {
        "cross_entropy": -student.log_softmax(-1).gather(-1, labels[:, None])[:, 0],
        "divergence": divergence(*outcomes(s, t, spec), spec),
        "student_entropy": entropy(s).detach(),
        "teacher_entropy": entropy(t),
        "top1_agreement": (student.argmax(-1) == teacher.argmax(-1)).to(student.dtype),
    }


def margins(student, teacher, spec):
    """How far the discontinuous choices are from flipping: running sum from alpha, k-th from the next largest logit."""
    s = student / spec["temperature"]
    t = teacher / (spec["temperature"] * spec["teacher_temperature"])
    found = {}
    if spec["objective"] == "adaptive_kl":
        found["alpha"] = adaptive_weights(*outcomes(s, t, spec), spec["adaptive_alpha"])[2].min().item()
    if 0 < spec["topk"] < teacher.shape[-1]:
        ordered = teacher.sort(-1, descending=True).values
        found["topk"] = (ordered[:, spec["topk"] - 1] - ordered[:, spec["topk"]]).min().item()
    return found
