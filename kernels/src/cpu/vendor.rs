//! Who made this CPU, where that decides what is fast. Nothing here changes a result.

use std::arch::x86_64::__cpuid;

/// AMD, or Hygon, who build on its cores.
pub(super) fn is_amd() -> bool {
    let leaf = __cpuid(0);
    let name = [leaf.ebx, leaf.edx, leaf.ecx].map(u32::to_le_bytes);
    let names = [*b"AuthenticAMD", *b"HygonGenuine"];
    names.iter().any(|amd| amd == name.as_flattened())
}

/// Whether a core that has registers of 512 bits also computes and reads so many at a time, two times a cycle. An AMD's
/// does since Zen 5, family 0x1a (not those for notebooks, which are of the same family); a Zen 4 takes two steps.
pub(super) fn computes_512_bits_at_once() -> bool {
    const ZEN_5: u32 = 0x1a;
    !is_amd() || family() >= ZEN_5
}

/// The family, with its extension.
fn family() -> u32 {
    let signature = __cpuid(1).eax;
    match signature >> 8 & 0xf {
        0xf => 0xf + (signature >> 20 & 0xff),
        family => family,
    }
}
