"""Class names: the data's, those that weights know, and those confused most."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import functools
import itertools
import json
import re
import unicodedata
import zlib
from collections.abc import Iterable, Sequence

from PIL import Image
from torch.utils.data import Dataset

from split_affinity.data.pictures import ImageData
from split_affinity.errors import UserError
from split_affinity.models.pretrained import Pretrained, find_weights, imagenet_classes
from split_affinity.options.settings import Settings
from split_affinity.text import did_you_mean, readable

# The WordNet ids of ImageNet's 1,000 classes ascend. These are the steps from one to the next: all
# first bytes, then the second and the third ones, compressed, in base 85 (see wordnet_ids).
WORDNET_STEPS = """
c-rk#XINBc7XI4(Zk=*xhAF@>GdM`Mg2+Y?OYpHpv4AKD8cTwrAR2wFAfOlvI?`4}1&xkqRF<NNHELWp3PxAiATbtn?Ir8F8bh*s
HMqNf_uu~T{5ZEf=RMzf-}8PR;9dMb1bipKyJ!zji~wZF|L6?;f2tWm4FE#OAl%-=`m<1Bkysi7G@*!6X(Tg*>*(icVJu!4W9TcO
K@3HVg&HIdQeOGT6XSRYk&Ia$v7CmoltZ0ZC_sQ9B=#Uokrm<qgo#FmvJ<LpNDd}g*2C!<!D<MHj9w0R0!lani5v<v3V<?Lg^`6r
dQGH`+Vqmj=go8wK=kGXzn;IHFvM?}VF>?A2_@rp)a#Eonf!+Tw_@<^qrK=Y8n)NJX^J7MP~qR;Df9YZ#1af8{1K!S3#_JdpRQgK
%L>DJg9dst976C@%Bu;DRQt=6rm!+bjO@Wt6|Y4w0&0~(8BD#zu@F;87@#N%35%4h7Szyy)SUy>IEQc{!B~*gff8?F)Y4#8Z*G_;
(h-p&5daQhr6CJ=0!&I96J&ic&l5h1k!6C+tf~WIQK$qhz+Y`w_69-)2z7$UDhFCL&{MHa4-OC;)jF}n_GAF<=%+KuzDyXPm;g18
z2u0&(29MC#saVp!wda<iB{VMqF7?=7ZmDEsBg5)8`J<AutC$+o5Ugt7|8PmmKyya6$s{_C&iST$zzr!f^icvX#kRtD$=Nt1g(dc
w?amv7FC)+L}aI0k=;{*D!l}d9rq<7HXtBUsEngRA`1u*C_sq!WIDniPXnQl4^-PZBv1?~ffflt0mvGj>VUUa)+<|-lx4__ikBHq
WfaVS5h=DZqG-V)_Lq4pP_Yb_<Y<m%v}V1=FI3M0DswW&>j2UrL7`yl*VP6^#g<?oHHlERV!$GxV$=*mS{2J$sec#-CWk_kl^7et
NHPMXgEG8wDbx;)p3&=V$U{rao>;c?B9b_Vpu&pA&}7q6&O_8PjIs``BpLwAF<6wi-cV-*1Q88kJgAveZf<q-th*d35lbQ_f*(sk
4-qN_P;n>ML1$G{R;8HJ?6Wk}I6jDFjG@zlNX)7}{)_gI1arA&#i<n4-Ls>wPwYFqTZt(9uwh%<E>D;l6tnl)v6|{}S^fS0<oYJ1
;L{PwnNiszZ+P`ieW<y5%C9Uxcls^keBOTL-jG?zTe^Rd<SI<W0X-l8RA*W#p9?)*9oq9;!OOujdbU=5;w8jCa91>U^SN*&_)tJd
v?DcpTWrSal8%$C#(8Ilv^>z%!{>Y5`{K)wR!84|=uTR;e7BUISaWkoNP}(7?ZP=(W4?g5<jM_&6(w9j(&4p>r|dZDkyi5T!-y#}
uDMU`jw{~NGVSBM1#9<Zg5H&j=M)w-jvSV_|KPE@CGnMeX0FH`SGFc+vHRAF)s>Iz!)wwKE0PPE_7!~R&bVGh({Cgt4$YaK_e1TJ
`I~%d%61oB%g>p6c~aE2`Y{PL`E}b1b=t_)DgX4XdN}LB*&i-7gwJ+AJ#gF!H-7Nm!hn=5lFuTq+{$k8w&2qDTzPG_ryCxftN-lz
qVKOS{UxZraPy%<d3laI%rE8ZmUgpu*yTu#>vyrsUze+9MPz49zTEkvGkEMXTD)uj#&50W%s6i!!MF0rqiodWMgKNe=E|e)oLFb+
jGQygw;FHf@1Of?XlwCTA#vVnd$y~(`1uD<y-uBKSzpjFpwVUSo8?SvD(lpzaADapeST`i7H5x6e!XH^59H49XgzSk(Apzr!{exg
C$_G424wV$zHuqD?&~vuDZlDBbo<zXGcAM0{_)CgeCSByljtR;i`qZ*0m*wpgyTK7x@oFy`RUsi$BH-a*8iHYfz}4>UK5fZ<{TZX
K6tmOtZv$>8P6V`tbLIc)3NmY`e(X^^MP@Ly07gXZMskxoSSs!(nMq54E5vL`}=;pulK_6KbQYK<b5Xo#IT~=jAJ1ILB<jX&bBA;
{`pjxb$HbCuODqrx>q87k{^`TA6Pm)<!vplQD0WRI+2{avMT$lqfA6#Ywb>P>Fpu(AC1%1HPIRA4Q=V&Qk&<L-RhDQA6Fk8etu1A
afSb!lix($nZNZ&^UD@zsmr*j#dqgXYm(vg-*$GUpQjuyVcsw8HGZCJqCDxrgt98ts=e7I_k-r#e_UN#o7ny7@}CQAk+I(|>(mhO
<BlH}rJFXUExEZVA!6R%&x)pYnc%n-JZ^cb-}pn)T^n9|r7AOS@Kndac|+Ija}A3dx!`_s;?~A7qc#i-%Q*SF9Z#-)p7E+8A6K_U
H@&bQneA%TyPllGkspSW;--t_r=j=6bzzgT1~rfHnLYS&(WsFlY&*L@At9t<eUM{7x;rr|jXOJcT*i6B<k4-fns(jjaQ)jaw`JaO
zH}Aoho7FhE;#qV*~+N?wvA!Od&S2#^f_oQ>Qy>%dzNj}wKWN+=l;I@LTc@~?*=wcb|-8;7PsKi#0K-f0KI-R8~
"""


@functools.cache
def wordnet_ids() -> tuple[str, ...]:
    """The ids in WordNet 3.0 (nouns) of ImageNet's 1,000 classes, in their order."""
    planes = zlib.decompress(base64.b85decode("".join(WORDNET_STEPS.split())))
    steps = zip(planes[:1000], planes[1000:2000], planes[2000:], strict=True)
    numbers = itertools.accumulate(int.from_bytes(step, "big") for step in steps)
    return tuple(f"n{number:08}" for number in numbers)


def spelling(name: str) -> str:
    """A class's name without capitals, underscores, hyphens and differences in Unicode."""
    return re.sub(r"[\s_-]+", " ", unicodedata.normalize("NFC", name)).strip().casefold()


def match_classes(names: Iterable[str], known: Sequence[str], asked: str) -> list[int]:
    """The index of each name among the known classes of the weights that were `asked` for.

    The exact name goes before one that differs only in `spelling`; ImageNet's WordNet ids count as
    names, too. Raises UserError for an unknown name, or one that can be several classes.
    """
    exact: dict[str, list[int]] = {}
    alike: dict[str, list[int]] = {}
    ids = wordnet_ids() if tuple(known) == imagenet_classes() else ()
    for index, name in itertools.chain(enumerate(known), enumerate(ids)):
        exact.setdefault(name, []).append(index)
        alike.setdefault(spelling(name), []).append(index)
    found = []
    for name in names:
        places = exact.get(name) or alike.get(spelling(name)) or []
        if not places:
            hint = did_you_mean(spelling(name), alike)
            raise UserError(f"class {name} is none of the {len(known)} of {asked}{hint}")
        if len(places) > 1:
            which = ", ".join(ids[place] if ids else f"class {place}" for place in places)
            raise UserError(f"class {name} can be several of {asked}: {which}; use such names")
        found += places
    return found


class Renumbered(Dataset):
    """Another data set's pictures, with other numbers for its classes."""

    def __init__(self, pictures: Dataset, numbers: Sequence[int]):
        self._pictures, self._numbers = pictures, numbers

    def __len__(self) -> int:
        return len(self._pictures)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        picture, target = self._pictures[index]
        return picture, self._numbers[target]

    @property
    def targets(self) -> list[int]:
        """The numbers of the classes of all pictures."""
        return [self._numbers[target] for target in self._pictures.targets]


def with_known_classes(data: ImageData, settings: Settings) -> ImageData:
    """The data with the classes of the weights to test; UserError for a class unknown to them."""
    known = find_weights(settings.model, settings.weights).classes
    asked = f"--weights {settings.weights}"
    if settings.num_classes not in (None, len(known)):
        raise UserError(f"--num-classes {settings.num_classes}: {asked} know {len(known)} classes")
    try:
        numbers = match_classes(data.classes, known, asked)
    except UserError as error:
        raise UserError(f"--data-path {settings.data_path}: {error}") from None
    train, val = (Renumbered(part, numbers) for part in (data.train, data.val))
    return dataclasses.replace(data, train=train, val=val, classes=known)


def named_classes(names: Sequence[str], count: int) -> list[str]:
    """Names for all classes of a model, which may have more than the data."""
    return [*names, *(f"class {number}" for number in range(len(names), count))]


def confused_classes(settings: Settings, classes: Sequence[str]) -> list[int] | None:
    """The classes that were confused most, by the file of `--augment-confused`; None without it.

    They are those of pairs with at least half as many images as the worst pair. Raises UserError
    for a file of something else, or of other classes.
    """
    path = settings.augment_confused
    if path is None or settings.test_only:
        return None
    try:
        pairs = [
            (each["images"], {str(each["true"]), str(each["taken_for"])})
            for each in json.loads(path.read_bytes())["pairs"]
        ]
        least = max((images for images, _ in pairs), default=0) / 2
        names = {name for images, pair in pairs if images >= least for name in pair}
    except OSError as error:
        raise UserError(f"--augment-confused {path}: {error.strerror}") from None
    except (ValueError, LookupError, TypeError, RecursionError):
        raise UserError(f"--augment-confused {path}: no confused.json of a --test-only") from None
    known = named_classes(classes, settings.num_classes or 0)
    for name in sorted(set().union(*(pair for _, pair in pairs)).difference(known)):
        raise UserError(f"--augment-confused {path}: the data have no class {readable(name)}")
    return [number for number, name in enumerate(classes) if name in names]


def knows_classes(known: Pretrained, classes: Sequence[str]) -> bool:
    """Whether weights were trained for these classes, in this order."""
    with contextlib.suppress(UserError):
        return match_classes(classes, known.classes, "") == [*range(len(known.classes))]
    return False
