"""Names whose meanings are about to be written."""
from vnnigen.isa.insn import insn
NAMES = """mov movzx movsx movsxd lea add sub imul inc dec neg and or xor not shl shr sar cmp test div cqo push pop jmp ret prefetcht0 prefetcht1
prefetchnta prefetchw bzhi shlx shrx sarx kmovb kmovw kmovd kmovq kxorb kxorw kxord kxorq kortestb kortestw kortestd kortestq kandb kandw kandd kandq
kandnb kandnw kandnd kandnq knotb knotw knotd knotq korb korw kord korq kxnorb kxnorw kxnord kxnorq
vzeroupper vmovdqu vmovdqa vmovdqu8 vmovdqu16 vmovdqu32 vmovdqu64 vmovdqa32 vmovdqa64 vmovups vmovaps vmovd vmovq vmovss vmovntdq vmovntps
vpbroadcastb vpbroadcastw vpbroadcastd vpbroadcastq vbroadcastss vbroadcasti32x4 vbroadcasti64x4 vbroadcasti128 vpxor vpxord vpxorq vpand vpandd vpandq
vpor vpord vporq vpandn vpandnd vpandnq vxorps vandps vorps vandnps vpternlogd vpaddb vpaddw vpaddd vpaddq vpaddsb vpaddsw vpaddusb vpaddusw
vpsubb vpsubw vpsubd vpsubq vpsubsb vpsubsw vpsubusb vpsubusw vpmulld vpmullw vpmulhw vpmulhuw vpmaddwd vpmaddubsw vpdpbusd vpdpbusds vpdpwssd vpdpwssds vdpbf16ps
vpminsb vpminsw vpminsd vpminub vpminuw vpminud vpmaxsb vpmaxsw vpmaxsd vpmaxub vpmaxuw vpmaxud
vpslld vpsrld vpsrad vpsllw vpsrlw vpsraw vpsllq vpsrlq vpslldq vpsrldq vpackssdw vpackusdw vpacksswb vpackuswb
vpunpcklbw vpunpckhbw vpunpcklwd vpunpckhwd vpunpckldq vpunpckhdq vpunpcklqdq vpunpckhqdq
vpermd vpermq vpermb vpermw vpermps vperm2i128 vpermt2d vpermt2w vpermt2b vpermt2q vpshufb vpshufd vpshuflw vpshufhw vshufi32x4 vshufi64x2 vshufps vpalignr vpblendd vpblendvb vblendvps vblendmps
vpblendmd vpblendmb vpblendmw vinserti128 vextracti128 vinserti32x4 vextracti32x4 vinserti64x4 vextracti64x4 vpextrb vpextrw vpextrd vpextrq vpinsrb vpinsrw vpinsrd vpinsrq
vpmaskmovd vmaskmovps vpmovzxbw vpmovsxbw vpmovzxbd vpmovsxbd vpmovzxwd vpmovsxwd vpmovdb vpmovsdb vpmovusdb vpmovwb vpmovswb vpmovuswb vpmovdw vpmovsdw vpmovusdw
vpmovm2b vpmovb2m vpmovm2w vpmovw2m vpmovm2d vpmovd2m vpmovmskb vmovmskps vpabsd vpabsw vpabsb vpcmpeqb vpcmpeqw vpcmpeqd vpcmpgtb vpcmpgtw vpcmpgtd vpcmpb vpcmpub vpcmpw vpcmpuw vpcmpd vpcmpud
vptest vptestmb vptestmd vptestnmd vaddps vsubps vmulps vdivps vmaxps vminps vsqrtps vaddss vsubss vmulss vdivss vmaxss vminss
vfmadd132ps vfmadd213ps vfmadd231ps vfnmadd132ps vfnmadd213ps vfnmadd231ps vfmsub132ps vfmsub213ps vfmsub231ps vfnmsub132ps vfnmsub213ps vfnmsub231ps
vfmadd132ss vfmadd213ss vfmadd231ss vfnmadd132ss vfnmadd213ss vfnmadd231ss
vcmpps vcvtdq2ps vcvtps2dq vcvttps2dq vrndscaleps vroundps vcvtneps2bf16 vcvtne2ps2bf16 vcvtph2ps vcvtps2ph vmovhlps vmovlhps""".split()
CONDITIONS = [("o",), ("no",), ("b", "c"), ("ae", "nc"), ("e", "z"), ("ne", "nz"), ("be",), ("a",), ("s",), ("ns",), ("p",), ("np",),
              ("l",), ("ge",), ("le",), ("g",)]


def pending(*args: object) -> None:
    """Not yet."""
    raise NotImplementedError


insn(*NAMES, kind="control")(pending)
for c, *more in CONDITIONS:
    for stem in ("j", "cmov", "set"):
        insn(stem + c, kind="control", aliases=tuple(stem + m for m in more))(pending)
