# The default policy: grants say yes, denies say no and win, and nothing said means no.
#
# A pure function of its input and of the rules (grants and denies, made ready by keybroker). It sees no clock, no history and no
# network. It keeps to equality, `in`, `split`, `concat`, `count`, `array.concat`, `array.slice` and walks over arrays, which
# OPA and its WebAssembly compile to the same answers.
package keybroker

import data.keybroker_rules as rules

default allow := false

allow if {
	count(granted) > 0
	count(denied_by) == 0
}

decision := {
	"allow": allow,
	"reasons": reasons,
	"grants": [rule.id | allow; some rule in granted],
	"policy": rules.policy,
	"obligations": [obligation | allow; some rule in granted; obligation := obligation_of(rule)],
}

# What a grant demands beyond a yes. Hours and limits are about uses of keys; a quorum is also about what widens access.
obligation_of(rule) := rule.obligation if is_signing

obligation_of(rule) := rule.when_changed if input.operation in ["unfreeze", "admin-policy"]

obligation_of(rule) := rule.when_read if not input.operation in ["sign", "sign-digest", "unfreeze", "admin-policy"]

is_signing if input.operation in ["sign", "sign-digest"]

# Rules are indexed by whom they are for, so that a decision walks the caller's own rules, not everybody's.
mine := array.concat(
	array.concat(
		[rule | some rule in rules.grants.exact[input.caller.spiffe_id]],
		[rule | some rule in rules.grants.prefix[first_segment]; is_for_caller(rule)],
	),
	array.concat(
		[rule | some rule in rules.grants.domain[input.caller.trust_domain]; is_for_caller(rule)],
		[rule | some rule in rules.grants.anybody],
	),
)

against_me := array.concat(
	array.concat(
		[rule | some rule in rules.denies.exact[input.caller.spiffe_id]],
		[rule | some rule in rules.denies.prefix[first_segment]; is_for_caller(rule)],
	),
	array.concat(
		[rule | some rule in rules.denies.domain[input.caller.trust_domain]; is_for_caller(rule)],
		[rule | some rule in rules.denies.anybody],
	),
)

first_segment := concat("/", [input.caller.trust_domain, input.caller.path[0]])

is_for_caller(rule) if matches(rule.path, rule.is_open, input.caller.path)

# A pattern against a path, segment by segment: `*` is any one segment, and an open pattern goes on for one or more.
matches(pattern, is_open, path) if {
	not is_open
	count(pattern) == count(path)
	starts_alike(pattern, path)
}

matches(pattern, is_open, path) if {
	is_open
	count(pattern) < count(path)
	starts_alike(pattern, path)
}

starts_alike(pattern, path) if {
	every index, segment in pattern {
		is_segment(segment, path[index])
	}
}

is_segment("*", _)

is_segment(segment, segment) if segment != "*"

# Grants.

# What signs and reads keys comes first and alone: each decision walks the caller's rules, and this is what most of them are about.
on_target := [rule | some rule in mine; covers(rule.keys, input.target.id)] if input.target.kind == "key"

# "Is there a target at all?": how roles are found. Nothing is ever done to such a target.
on_target := mine if input.target.kind == "any"

on_target := [rule | some rule in mine; concerns_target(rule)] if not input.target.kind in ["key", "any"]

concerns_target(rule) if {
	input.target.kind == "key"
	covers(rule.keys, input.target.id)
}

concerns_target(rule) if {
	input.target.kind == "trail"
	some trail in rule.trails
	is_among(trail)
}

concerns_target(rule) if {
	input.target.kind == "workload"
	some subject in rule.subjects
	is_among(subject)
}

concerns_target(rule) if {
	input.target.kind == "token"
	covers(rule.tokens, input.target.id)
}

concerns_target(rule) if {
	input.target.kind == "everything"
	some subject in rule.subjects
	subject.is_any
}

concerns_target(rule) if {
	input.target.kind == "policy"
	"admin-policy" in rule.operations
}

concerns_target(rule) if {
	input.target.kind == "grant"
	input.target.id in rule.waives
}

covers(names, _) if "*" in names

covers(names, name) if {
	name in names
	name != "*"
}

is_among(pattern) if pattern.is_any

is_among(pattern) if {
	not pattern.is_any
	matches(pattern.path, pattern.is_open, split(input.target.workload, "/"))
}

with_operation := [rule | some rule in on_target; input.operation in rule.operations]

with_algorithm := [rule | some rule in with_operation; permits_algorithm(rule)]

permits_algorithm(rule) if input.algorithm in rule.algorithms

permits_algorithm(_) if not is_signing

matching := [rule | some rule in with_algorithm; permits_network(rule)]

permits_network(rule) if count(rule.networks) == 0

permits_network(rule) if {
	some network in input.caller.networks
	network in rule.networks
}

# A workload may read its own trail without a grant.
own_trail := [{"id": "own-trail", "when_read": nothing_more("own-trail")} |
	input.operation == "read-audit"
	input.target.kind == "trail"
	input.target.workload == input.caller.spiffe_id
]

# Whoever is in a group of a quorum may approve what that grant covers: the use of this key, or this change, asked for by this workload.
approving := [{"id": rule.id, "when_read": nothing_more(rule.id)} |
	input.operation == "approve"
	some rule in for_requester
	concerns_approval(rule)
	some stage in rule.obligation.quorum
	rules.people[input.caller.spiffe_id] in stage.people
]

concerns_approval(rule) if {
	input.target.kind == "key"
	covers(rule.keys, input.target.id)
}

concerns_approval(rule) if {
	input.target.kind == "change"
	input.target.id in rule.operations
}

for_requester := array.concat(
	array.concat(
		[rule | some rule in rules.grants.exact[input.target.workload]],
		[rule | some rule in rules.grants.prefix[concat("/", [requester_domain, requester_path[0]])]; is_for_requester(rule)],
	),
	array.concat(
		[rule | some rule in rules.grants.domain[requester_domain]; is_for_requester(rule)],
		[rule | some rule in rules.grants.anybody],
	),
)

is_for_requester(rule) if matches(rule.path, rule.is_open, requester_path)

# spiffe://DOMAIN/PATH: what is not written like that is nobody.
requester := parts if {
	parts := split(input.target.workload, "/")
	array.slice(parts, 0, 2) == ["spiffe:", ""]
}

requester_domain := requester[2]

requester_path := array.slice(requester, 3, count(requester))

nothing_more(id) := {
	"grant": id,
	"not_before": "",
	"not_after": "",
	"hours": [],
	"limits": [],
	"quorum": [],
	"cool_off_s": 0,
	"expires_s": 0,
	"evidence": [],
	"observe_only": false,
}

granted := once(array.concat(array.concat(matching, own_trail), approving))

# Each rule once: it is here several times if several of its workload patterns fit.
once(found) := [rule | some index, rule in found; not rule.id in array.slice(ids, 0, index)] if ids := [rule.id | some rule in found]

# Denies: a selector that is not given fits everything. Keys, trails, subjects, tokens and waives are all targets, so a deny that
# names several of them fits each.

denied_by := [rule.id | some rule in once(against_this)]

against_this := [rule |
	some rule in against_me
	fits_target(rule)
	fits_operation(rule)
	fits_algorithm(rule)
	fits_networks(rule)
]

fits_target(rule) if {
	count(rule.keys) == 0
	count(rule.trails) == 0
	count(rule.subjects) == 0
	count(rule.tokens) == 0
	count(rule.waives) == 0
}

fits_target(rule) if concerns_target(rule)

# The whole record holds every trail, so whoever may not read one of them may not read the whole.
fits_target(rule) if {
	count(rule.trails) > 0
	input.target.kind == "trail"
	input.target.workload == ""
}

# Everything holds every workload, in the same way.
fits_target(rule) if {
	count(rule.subjects) > 0
	input.target.kind == "everything"
}

fits_operation(rule) if count(rule.operations) == 0

fits_operation(rule) if input.operation in rule.operations

fits_algorithm(rule) if count(rule.algorithms) == 0

fits_algorithm(rule) if input.algorithm in rule.algorithms

fits_networks(rule) if count(rule.networks) == 0

fits_networks(rule) if {
	some network in input.caller.networks
	network in rule.networks
}

# Why not, in stable names. `no-grant` must look to the caller as if the target did not exist.

reasons := array.concat(
	[reason | not allow; some reason in missing],
	[reason | some id in denied_by; reason := concat("", ["denied-by:", id])],
)

missing := [] if count(granted) > 0

missing := ["no-grant"] if {
	count(granted) == 0
	count(on_target) == 0
}

missing := ["operation-not-granted"] if {
	count(granted) == 0
	count(on_target) > 0
	count(with_operation) == 0
}

missing := ["algorithm-not-granted"] if {
	count(granted) == 0
	count(with_operation) > 0
	count(with_algorithm) == 0
}

missing := ["network-not-granted"] if {
	count(granted) == 0
	count(with_algorithm) > 0
}
