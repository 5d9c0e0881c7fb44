//! The block devices on the PCI bus, and the drivers that the kernel binds to them.
#![forbid(unsafe_code)]

use crate::system::{Result, tell, text};
use std::fs;
use std::path::Path;

const BUS: &str = "/sys/bus/pci";

/// Returns the addresses of all virtio block devices, in order.
pub(crate) fn block_devices() -> Result<Vec<String>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(format!("{BUS}/devices"))? {
        let address = entry?.file_name().to_string_lossy().into_owned();
        let identity = |what| text(&format!("{BUS}/devices/{address}/{what}"));
        if identity("vendor")? == "0x1af4" && identity("device")? == "0x1042" {
            found.push(address);
        }
    }
    found.sort();
    Ok(found)
}

/// Gives a device to `vfio-pci`. Returns the number of its IOMMU group.
pub(crate) fn give_to_vfio(address: &str) -> Result<u32> {
    let device = format!("{BUS}/devices/{address}");
    tell(&format!("{device}/driver_override"), "vfio-pci")?;
    if Path::new(&format!("{device}/driver")).exists() {
        tell(&format!("{device}/driver/unbind"), address)?;
    }
    tell(&format!("{BUS}/drivers_probe"), address)?;
    let driver = fs::read_link(format!("{device}/driver"))
        .map_err(|error| format!("{address} has no driver: {error}"))?;
    if !driver.ends_with("vfio-pci") {
        return Err(format!("{address} has another driver: {}", driver.display()).into());
    }
    let group = fs::read_link(format!("{device}/iommu_group"))
        .map_err(|error| format!("{address} has no IOMMU group: {error}"))?;
    let group = group.file_name().ok_or("an IOMMU group without a number")?;
    Ok(group.to_string_lossy().parse()?)
}
