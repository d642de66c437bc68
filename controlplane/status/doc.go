// Package status says where policy is in force and where it is not.
//
//	ControlPlane.Report ──► Report of each replica ──Merge──► Status ──► Table, JSON
//
// A sidecar is connected to one replica, and only that one knows what it has confirmed (ACK) or refused (NACK). So the whole is known to nobody:
// whoever asks gathers the reports. A policy is in force in a pod if the pod's sidecar has confirmed everything that the replica it is
// connected to wants it to hold, and that replica holds the newest version of the policy.
package status
