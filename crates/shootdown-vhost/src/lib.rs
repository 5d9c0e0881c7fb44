//! A vhost-user back-end with an IOMMU.
