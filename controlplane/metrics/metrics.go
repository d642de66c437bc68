// Package metrics shows what the xDS server's ledger knows as Prometheus metrics.
//
//	mantlet_xds_sidecars{state}          known: something was published; connected; in_force: connected, and all was confirmed
//	mantlet_xds_responses_total{type}    sent, and _resources_total, _removals_total, _bytes_total
//	mantlet_xds_acks_total{type}         responses that were confirmed, and _nacks_total: refused
//	mantlet_xds_ack_seconds{type}        from the moment when a resource was published to its ACK
//
// type is the last part of the type URL: Listener, Cluster, TypedExtensionConfig, Verdicts, Packets, Network.
package metrics

import (
	"strings"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/mantlet/mantlet/xds/server"
)

// XDS collects the metrics of one server. Set it as the server's Config.OnEvent, and tell it the ledger once that is there.
type XDS struct {
	acks *prometheus.HistogramVec
}

// NewXDS registers the histogram.
func NewXDS(r prometheus.Registerer) *XDS {
	x := &XDS{acks: prometheus.NewHistogramVec(prometheus.HistogramOpts{
		Name: "mantlet_xds_ack_seconds", Help: "Time from publishing a resource to its ACK by a sidecar.",
		Buckets: []float64{.001, .0025, .005, .01, .015, .025, .05, .1, .25, .5, 1, 2.5, 5, 10},
	}, []string{"type"})}
	r.MustRegister(x.acks)
	return x
}

// OnEvent is for server.Config.
func (x *XDS) OnEvent(e server.Event) {
	if e.Kind == server.Acked && !e.Published.IsZero() {
		x.acks.WithLabelValues(short(e.Type)).Observe(e.At.Sub(e.Published).Seconds())
	}
}

func short(typeURL string) string { return typeURL[strings.LastIndexByte(typeURL, '.')+1:] }

// Ledger is a collector of what a ledger counts.
func Ledger(l *server.Ledger) prometheus.Collector { return ledger{l} }

type ledger struct{ of *server.Ledger }

var (
	sidecars = prometheus.NewDesc("mantlet_xds_sidecars", "Sidecars, by what is known of them.", []string{"state"}, nil)

	counts = []struct {
		desc *prometheus.Desc
		of   func(server.Counters) uint64
	}{
		{counter("responses", "Responses sent."), func(c server.Counters) uint64 { return c.Responses }},
		{counter("resources", "Resources sent."), func(c server.Counters) uint64 { return c.Resources }},
		{counter("removals", "Removals of resources sent."), func(c server.Counters) uint64 { return c.Removals }},
		{counter("bytes", "Bytes of resources sent."), func(c server.Counters) uint64 { return c.Bytes }},
		{counter("acks", "Responses that sidecars confirmed."), func(c server.Counters) uint64 { return c.Acks }},
		{counter("nacks", "Responses that sidecars refused."), func(c server.Counters) uint64 { return c.Nacks }},
	}
)

func counter(name, help string) *prometheus.Desc {
	return prometheus.NewDesc("mantlet_xds_"+name+"_total", help, []string{"type"}, nil)
}

// Describe implements prometheus.Collector.
func (ledger) Describe(out chan<- *prometheus.Desc) {
	out <- sidecars
	for _, c := range counts {
		out <- c.desc
	}
}

// Collect implements prometheus.Collector.
func (l ledger) Collect(out chan<- prometheus.Metric) {
	var known, connected, inForce float64
	for _, s := range l.of.Snapshot() {
		known++
		if s.Connected {
			connected++
		}
		if s.InForce {
			inForce++
		}
	}
	for state, n := range map[string]float64{"known": known, "connected": connected, "in_force": inForce} {
		out <- prometheus.MustNewConstMetric(sidecars, prometheus.GaugeValue, n, state)
	}
	for url, total := range l.of.Totals() {
		for _, c := range counts {
			out <- prometheus.MustNewConstMetric(c.desc, prometheus.CounterValue, float64(c.of(total)), short(url))
		}
	}
}
